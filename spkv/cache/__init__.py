"""The cache core, free of transformers: page bookkeeping, the packed cache, and its dense oracle."""
