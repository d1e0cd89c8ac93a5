"""Texts and data sets to windows and batches of token ids."""
