"""The method in plain torch, tiled over the vocabulary. It runs on any device and is the place to read the algebra."""

WORKSPACE_BYTES = 4 << 20  # fits a core's cache
