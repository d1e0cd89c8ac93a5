"""Recipes: named sets of settings as TOML files, and the settings that a run reads."""
