"""The operators: gated attention for training, pruned prefill, packed decode, the write into pages and its count."""
