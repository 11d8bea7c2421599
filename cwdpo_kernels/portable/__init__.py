"""The method in plain torch: tiled over the vocabulary, on any device, and the readable statement of the algebra."""

WORKSPACE_BYTES = 4 << 20  # fits the cache of a core
