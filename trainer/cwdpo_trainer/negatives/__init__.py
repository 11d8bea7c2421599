"""Rejected answers that the policy generates itself while it trains."""
