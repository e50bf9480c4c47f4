"""Pictures of what a self-pruning KV cache kept: a density heat map and a page of shaded tokens."""

from spkv.inspect.report import plot_density, write_token_page

__all__ = ["plot_density", "write_token_page"]
