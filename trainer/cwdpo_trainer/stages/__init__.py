"""The two training stages, on `transformers.Trainer`."""
