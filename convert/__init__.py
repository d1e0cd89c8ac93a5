"""Conversion between Hugging Face folders and Flax pytrees; one rule table per family serves both directions."""
