"""Kept indices in, a smaller pytree out."""
