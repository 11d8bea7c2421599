"""`cwdpo check`: everything that can be checked before the first training step."""
