"""Removal of groups: the walk through the layers, the choice of groups, slicing, and the refit."""
