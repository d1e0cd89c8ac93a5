"""What happened: summary, tables, page with plots, model card."""
