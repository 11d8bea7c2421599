"""Rejected answers drawn from the policy while it trains."""
