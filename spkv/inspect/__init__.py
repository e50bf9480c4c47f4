"""What a self-pruning KV cache keeps: densities and utilities by layer, head and token, as data and as a page.

Names are resolved on first use: pictures need numpy only, everything else needs torch and transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spkv.inspect.comparison import Comparison as Comparison
    from spkv.inspect.comparison import compare as compare
    from spkv.inspect.densities import TextDensities as TextDensities
    from spkv.inspect.densities import encode_pieces as encode_pieces
    from spkv.inspect.densities import text_densities as text_densities
    from spkv.inspect.frames import heads_frame as heads_frame
    from spkv.inspect.frames import pairs_frame as pairs_frame
    from spkv.inspect.frames import tokens_frame as tokens_frame
    from spkv.inspect.hybrid import HybridLayout as HybridLayout
    from spkv.inspect.hybrid import hybrid_layout as hybrid_layout
    from spkv.inspect.hybrid import make_hybrid as make_hybrid
    from spkv.inspect.inspection import Document as Document
    from spkv.inspect.inspection import Inspection as Inspection
    from spkv.inspect.inspection import inspect_texts as inspect_texts
    from spkv.inspect.page import write_inspection as write_inspection
    from spkv.inspect.report import plot_density as plot_density
    from spkv.inspect.report import write_token_page as write_token_page

_HOME = {
    "Comparison": "comparison",
    "Document": "inspection",
    "HybridLayout": "hybrid",
    "Inspection": "inspection",
    "TextDensities": "densities",
    "compare": "comparison",
    "encode_pieces": "densities",
    "heads_frame": "frames",
    "hybrid_layout": "hybrid",
    "inspect_texts": "inspection",
    "make_hybrid": "hybrid",
    "pairs_frame": "frames",
    "plot_density": "report",
    "text_densities": "densities",
    "tokens_frame": "frames",
    "write_inspection": "page",
    "write_token_page": "report",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spkv.inspect' has no attribute {name!r}")
    return getattr(importlib.import_module(f"spkv.inspect.{_HOME[name]}"), name)
