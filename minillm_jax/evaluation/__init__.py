"""What a model predicts, measured on text."""
