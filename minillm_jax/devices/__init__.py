"""Meshes of devices, shards of arrays, and processes of several hosts."""
