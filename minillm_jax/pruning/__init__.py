"""Removing groups: walk the layers, choose, slice, refit."""
