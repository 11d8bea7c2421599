"""Probes of held-out answers, scores of captions, the doctor, and the reports that show them."""
