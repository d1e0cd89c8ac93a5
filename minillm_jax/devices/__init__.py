"""Meshes of devices, the shards of arrays on them, and the processes of several hosts."""
