"""The operators: gated attention for training, pruned prefill, packed decode, and the write into pages."""
