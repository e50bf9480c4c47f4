"""Methods of other authors, through the library kvpress: each prunes the cache once, when a context has been read.

They score all pairs of a context after one dense pass over it, keep the best, and keep everything that follows. What
`spkv` reached is therefore asked for as a kept_fraction of the context. They read a context without chunks, and one
text at a time.

A method's name takes settings, such as `h2o+half` or `expected-attention+recent+heads`, since each is best with others:

- `recent`: the last 128 tokens are kept, of a small budget as many as half of it.
- `half`: half of what is kept are the last tokens, as in H2O (arXiv 2306.14048), whose scores kvpress averages over
  later queries where the paper adds them up.
- `heads`: heads of a layer share what is kept by their scores, and each keeps the best fifth of an equal share at
  least, as kvpress' AdaKVPress has it (after AdaKV, arXiv 2407.11550). kvpress masks what a head has dropped; here each
  head holds its own pairs, in the pages of an SPKVCache.

Methods that need weights of their own from a hub are not here.

Legend: B sequences, Hkv KV heads, T tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spkv.config import SPKVConfig
from spkv.gates import OpenGate
from spkv.hf.attach import attach, attachment, dense, detach, find_attachment
from spkv.hf.cache import CACHE_KEYWORD
from spkv.hf.families import find_decoder

PRESSES: dict[str, str] = {
    "h2o": "ObservedAttentionPress",
    "expected-attention": "ExpectedAttentionPress",
    "snapkv": "SnapKVPress",
    "tova": "TOVAPress",
    "keydiff": "KeyDiffPress",
}
SETTINGS = ("recent", "half", "heads")
# It reads the attention weights, which eager attention alone returns: [query heads, tokens, tokens] of each layer.
_NEED_WEIGHTS = ("h2o",)
# The same scores for all heads.
_EQUAL_SCORES = ("tova",)
_SNAPKV_WINDOW = 64  # the queries that it observes; kvpress' default
_RECENT = 128  # the usual window of self-pruning
_SAFEGUARD = 0.2  # the share of an equal budget that each head keeps whatever the others score; AdaKVPress' default

Kept = dict[int, Tensor]
"""What the heads of each layer keep of a context, [1, Hkv, T] bool by layer; empty where it was cut out already."""


@dataclass(frozen=True)
class Press:
    """A method and its settings.

    Attributes:
        method: out of `PRESSES`.
        recent, half, heads: see the module.
    """

    method: str
    recent: bool = False
    half: bool = False
    heads: bool = False

    @classmethod
    def of(cls, name: str) -> Press:
        """Read a policy's name.

        Raises:
            ValueError: for an unknown method or setting, or settings that exclude each other.
        """
        method, *settings = name.split("+")
        if method not in PRESSES:
            raise ValueError(f"policy {name}: methods are {', '.join(PRESSES)}")
        if len(set(settings)) < len(settings) or not set(settings) <= set(SETTINGS):
            raise ValueError(f"policy {name}: {method} takes the settings +{', +'.join(SETTINGS)}, each once")
        if {"recent", "half"} <= set(settings):
            raise ValueError(f"policy {name}: +recent and +half exclude each other")
        if "heads" in settings and method in _EQUAL_SCORES:
            raise ValueError(f"policy {name}: {method} gives all heads of a layer one score, so +heads changes nothing")
        return cls(method, *(setting in settings for setting in SETTINGS))

    @property
    def name(self) -> str:
        """The one way to write it."""
        return "+".join([self.method, *(setting for setting in SETTINGS if getattr(self, setting))])


def is_press(name: str) -> bool:
    """Whether a policy's name is a method's, with settings or without."""
    return "=" not in name and name.split("+")[0] in PRESSES


def check_press(name: str, model: PreTrainedModel | None = None) -> None:
    """Raise an error if kvpress is missing, or cannot prune the cache of `model`.

    Raises:
        ModuleNotFoundError: with the command that installs it.
        ValueError: for a model that kvpress does not support, or an unknown setting.
    """
    Press.of(name)
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
    with room_for_press(name, model):
        pass


def check_press_length(name: str, tokens: int) -> None:
    """Raise a ValueError for a context that is too short for a method to score."""
    least = _SNAPKV_WINDOW + 1 if Press.of(name).method == "snapkv" else 5
    if tokens < least:
        raise ValueError(f"policy {name} needs a context of at least {least} tokens; this one has {tokens}")


@contextlib.contextmanager
def room_for_press(name: str, model: PreTrainedModel) -> Iterator[None]:
    """Inside, a `Session` on this model makes a cache that can hold what the method keeps.

    That is the model's own where all heads keep as many pairs. Where they do not, it is an SPKVCache, of a model that
    is attached for the time, or as it is, and keeps every pair; its window is the last token, which no method drops.

    Raises:
        ValueError: for a model that cannot be attached, or is inside `spkv.dense`.
    """
    found = find_attachment(model)
    if not Press.of(name).heads:
        with contextlib.nullcontext() if found is None else dense(model):
            yield
        return
    if found is None:
        decoder = find_decoder(model)
        everything = tuple(range(decoder.kv_heads))
        attach(model, SPKVConfig(layout=(everything,) * len(list(decoder.attentions))))
    own = attachment(model)
    if own.suspended:
        raise ValueError(f"policy {name} cannot run inside spkv.dense")
    before = own.config, own.page_dtype
    own.config, own.page_dtype = dataclasses.replace(own.config, window=1, page_dtype=None), None
    try:
        with own.using(OpenGate()):
            yield
    finally:
        own.config, own.page_dtype = before
        if found is None:
            detach(model)


@contextlib.contextmanager
def pressing(name: str, model: PreTrainedModel, kept_fraction: float) -> Iterator[Kept]:
    """Prune the cache of a pass over a whole context to `kept_fraction` of its pairs.

    The pass runs with the model's own attention. With budgets by head it leaves the cache whole, and says what each
    head keeps.
    """
    asked, kept = Press.of(name), Kept()
    press = getattr(_kvpress(name), PRESSES[asked.method])(compression_ratio=1.0 - kept_fraction)
    _apply_settings(asked, press, kept)
    prune = press.forward_hook

    def forward_hook(module: Any, inputs: Any, kwargs: dict[str, Any], output: Any) -> Any:
        # The name by which kvpress looks for the cache, whatever transformers calls it.
        return prune(module, inputs, {**kwargs, "past_key_values": kwargs[CACHE_KEYWORD]}, output)

    press.forward_hook = forward_hook
    decoder = find_decoder(model)
    attentions: list[Any] = list(decoder.attentions)
    # kvpress leaves the rotary embedding on every attention layer.
    bare = [attention for attention in attentions if not hasattr(attention, "rotary_emb")]
    with contextlib.nullcontext() if find_attachment(model) is None else dense(model):
        before = decoder.config._attn_implementation
        try:
            if asked.method in _NEED_WEIGHTS:
                model.set_attn_implementation("eager")
            with press(model):
                yield kept
        finally:
            if asked.method in _NEED_WEIGHTS:
                model.set_attn_implementation(before)
            for attention in bare:
                if hasattr(attention, "rotary_emb"):
                    del attention.rotary_emb


def _apply_settings(asked: Press, press: Any, kept: Kept) -> None:
    """Make kvpress' method score recent tokens, and share budgets, as asked."""
    score, compute_n_kept = press.score, importlib.import_module("kvpress.utils").compute_n_kept

    def n_kept(T: int) -> int:
        return int(compute_n_kept(T, press.compression_ratio))

    def score_with_recent(*args: Any, **kwargs: Any) -> Tensor:
        scores: Tensor = score(*args, **kwargs).float()
        budget = n_kept(scores.shape[-1])
        recent = budget // 2 if asked.half else min(budget // 2, _RECENT) if asked.recent else 0
        recent = max(1, recent)  # the last token in any case: it is in every window
        scores[..., scores.shape[-1] - recent :] = torch.inf
        return scores

    def compress(module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        T = keys.shape[2]
        if n_kept(T) < T:
            kept[module.layer_idx] = share_by_score(press.score(module, hidden_states, keys, values, *rest), n_kept(T))
        else:
            kept[module.layer_idx] = keys.new_ones(keys.shape[:3], dtype=torch.bool)
        return keys, values

    if asked.recent or asked.half or asked.heads:
        press.score = score_with_recent
    if asked.heads:
        press.compress = compress


def share_by_score(scores: Tensor, budget: int) -> Tensor:
    """Let heads share their budgets: the best pairs of all of them, after some of each, as kvpress' AdaKVPress does.

    Args:
        scores: [B, Hkv, T].
        budget: pairs of each head on average, at most T.

    Returns:
        [B, Hkv, T] bool, budget * Hkv of each sequence.
    """
    B, Hkv, T = scores.shape
    safe = scores.topk(max(1, int(budget * _SAFEGUARD)), dim=-1).indices
    best = scores.scatter(-1, safe, torch.inf).flatten(1).topk(budget * Hkv, dim=-1).indices
    keep = torch.zeros(B, Hkv * T, dtype=torch.bool, device=scores.device)
    return keep.scatter_(1, best, True).view(B, Hkv, T)


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
