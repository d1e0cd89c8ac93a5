"""Reports of a finished job: summary, tables, report.html with plots, model card."""
