"""Probes of held-out pairs, captions, the doctor, and the reports they end up in."""
