"""The method in plain torch: tiled over the vocabulary, on any device, and the readable statement of the algebra."""
