"""The seam to transformers: model families, attaching, and the cache that `generate()` uses."""
