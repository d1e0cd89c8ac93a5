"""Conversion between Hugging Face folders and Flax pytrees: one rule table, read in both directions."""
