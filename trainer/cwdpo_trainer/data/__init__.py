"""Preference pairs: read from files and data sets, checked, and made into batches."""
