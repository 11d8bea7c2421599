"""The policy and its frozen reference: loading, adapters, sharding, cached log-probs."""
