"""The method in plain torch, tiled over the vocabulary. It runs on any device, and states the algebra readably."""

WORKSPACE_BYTES = 4 << 20  # fits a core's cache
