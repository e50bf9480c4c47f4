"""Methods of other authors, through the library kvpress: each prunes the cache once, when a context has been read.

They score all pairs of a context after one dense pass over it, keep the best of each head (all heads and layers the
same number), and keep everything that follows. What `spkv` reached is therefore asked for as a kept_fraction of the
context. They read a context without chunks, and one text at a time.

kvpress knows a family of methods more that are not here: those that keep other numbers of pairs in each head, which
are simulated by changing keys in place and free no memory, and those that need weights of their own from a hub.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spkv.hf.families import find_decoder

PRESSES: dict[str, str] = {
    "h2o": "ObservedAttentionPress",
    "expected-attention": "ExpectedAttentionPress",
    "snapkv": "SnapKVPress",
    "tova": "TOVAPress",
    "keydiff": "KeyDiffPress",
}
# It reads the attention weights, which eager attention alone returns: [query heads, tokens, tokens] of each layer.
_NEED_WEIGHTS = ("h2o",)
_SNAPKV_WINDOW = 64  # the queries that it observes; kvpress' default


def check_press(name: str, model: PreTrainedModel | None = None) -> None:
    """Raise an error if kvpress is missing, or cannot prune the cache of `model`.

    Raises:
        ModuleNotFoundError: with the command that installs it.
        ValueError: for a model that kvpress does not support.
    """
    kvpress = _kvpress(name)
    if model is None:
        return
    supported = kvpress.SUPPORTED_MODELS
    if not isinstance(model, supported):
        known = ", ".join(sorted(kind.__name__ for kind in supported))
        raise ValueError(f"policy {name}: kvpress supports {known}, not {type(model).__name__}")
    decoder = find_decoder(model)
    if len(decoder.global_layers) < len(list(decoder.attentions)):
        raise ValueError(f"policy {name}: kvpress would also prune this model's layers with a sliding window")


def check_press_length(name: str, tokens: int) -> None:
    """Raise a ValueError for a context that is too short for a method to score."""
    least = _SNAPKV_WINDOW + 1 if name == "snapkv" else 5
    if tokens < least:
        raise ValueError(f"policy {name} needs a context of at least {least} tokens; this one has {tokens}")


@contextlib.contextmanager
def pressing(name: str, model: PreTrainedModel, kept_fraction: float) -> Iterator[None]:
    """Prune the cache of a pass over a whole context to `kept_fraction` of its pairs."""
    press = getattr(_kvpress(name), PRESSES[name])(compression_ratio=1.0 - kept_fraction)
    decoder = find_decoder(model)
    attentions: list[Any] = list(decoder.attentions)
    before = decoder.config._attn_implementation
    # kvpress leaves the rotary embedding on every attention layer.
    bare = [attention for attention in attentions if not hasattr(attention, "rotary_emb")]
    try:
        if name in _NEED_WEIGHTS:
            model.set_attn_implementation("eager")
        with press(model):
            yield
    finally:
        if name in _NEED_WEIGHTS:
            model.set_attn_implementation(before)
        for attention in bare:
            if hasattr(attention, "rotary_emb"):
                del attention.rotary_emb


def _kvpress(name: str) -> Any:
    if "kvpress" in sys.modules:
        return sys.modules["kvpress"]
    functions = dict(ALL_ATTENTION_FUNCTIONS.items())
    try:
        return importlib.import_module("kvpress")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'policy {name} runs through kvpress, which is not installed ({error}): pip install "spkv[baselines]"',
            name=error.name,
        ) from error
    finally:
        # Importing kvpress wraps every attention function of transformers, for methods that are not used here. The
        # wrapper hands arguments on by position, which the function of an attached model does not take.
        for key, function in functions.items():
            with contextlib.suppress(KeyError):
                del ALL_ATTENTION_FUNCTIONS[key]
            if ALL_ATTENTION_FUNCTIONS.get(key) is not function:
                ALL_ATTENTION_FUNCTIONS[key] = function
