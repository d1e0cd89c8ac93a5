"""Numbers in, kept indices out. Nothing here runs a model."""
