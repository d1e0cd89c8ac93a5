"""What a model is and what it computes. Nothing here knows of pruning."""
