"""Preference pairs: read, checked and turned into batches."""
