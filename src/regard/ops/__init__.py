"""The functions: attention, linear attention, merging, caches."""
