"""`SPKVCache`: what `generate()` holds. Global layers share one packed cache; local layers keep transformers' own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from spkv.cache.packed import PackedCache
from spkv.config import PageDtype
from spkv.hf.families import Decoder

_EARLIER_KEYWORD = "past_key_values"
_NAMES = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
CACHE_KEYWORD = "cache" if "cache" in _NAMES else _EARLIER_KEYWORD
"""What transformers calls a cache in arguments and outputs: "cache" from 5.24 on, "past_key_values" before."""

NOT_CROPPABLE = (
    "an SPKVCache cannot be cropped: pairs that left the window were dropped. "
    "Assisted (speculative) decoding, which needs it, is not supported"
)


def rename_cache(kwargs: dict[str, Any]) -> None:
    """Give a cache among keyword arguments the name of this transformers, which takes the earlier one, too."""
    if _EARLIER_KEYWORD in kwargs:
        kwargs.setdefault(CACHE_KEYWORD, kwargs.pop(_EARLIER_KEYWORD))


class SPKVLayer(CacheLayerMixin):
    """A global layer as transformers sees it: it counts columns, and leaves the pairs to the packed cache."""

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.columns = 0
        self.pending = False  # between `update` and the attention that writes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count the new columns and hand the states on as they are: the attention function writes them."""
        if self.pending:
            raise ValueError(
                "an SPKVCache was used by an attention function that does not know it: the model was detached, is "
                "inside spkv.dense, or its attn_implementation was changed"
            )
        self.is_initialized = self.pending = True
        self.columns += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        # transformers before 5.3 passes the positions of the queries instead of their number.
        length = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.columns + length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.10

    def reset(self) -> None:
        self.columns, self.pending = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Nothing to do: the packed cache reorders all layers at once."""

    batch_select_indices = reorder_cache

    def offload(self) -> None:
        raise ValueError("an SPKVCache cannot be offloaded; its memory is bounded by max_memory instead")

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(NOT_CROPPABLE)


class SPKVCache(Cache):
    """The self-pruned cache of one model, handed to `generate(past_key_values=...)` or made by it.

    Args:
        decoder: the attached model's decoder (`spkv.attachment(model).decoder`).
        window, page_size: as in `SPKVConfig`.
        max_memory: bytes that the pages may take at most; None for no bound.
        page_dtype: as in `SPKVConfig`; those of local layers are not used.

    Raises:
        ValueError: for a sequence of page_dtypes that has not one for each layer.
    """

    def __init__(
        self,
        decoder: Decoder,
        window: int,
        page_size: int = 16,
        max_memory: int | None = None,
        page_dtype: PageDtype = None,
    ):
        self.global_layers, self._config = decoder.global_layers, decoder.config
        if isinstance(page_dtype, (list, tuple)):
            if len(page_dtype) != len(decoder.attentions):
                raise ValueError(
                    f"page_dtype has {len(page_dtype)} entries, and the model has {len(decoder.attentions)} layers"
                )
            page_dtype = [page_dtype[layer] for layer in self.global_layers]
        super().__init__(layers=self._new_layers())
        self.packed = PackedCache(len(self.global_layers), decoder.kv_heads, window, page_size, max_memory, page_dtype)
        self.window = window
        self.active: Tensor | None = None  # inside `stepping`
        self._slot = {layer: slot for slot, layer in enumerate(self.global_layers)}

    def _new_layers(self) -> list[Any]:
        # transformers knows best which cache each local layer needs.
        stock: list[Any] = DynamicCache(config=self._config).layers
        return [SPKVLayer() if i in self.global_layers else layer for i, layer in enumerate(stock)]

    def expect(self, layer: int, keep: Tensor, valid: Tensor | None) -> None:
        """`PackedCache.expect`, with the model's layer index."""
        self.packed.expect(self._slot[layer], keep, valid)

    def attend(self, layer: int, *args: Any, **kwargs: Any) -> Tensor:
        """`PackedCache.attend`, with the model's layer index."""
        own: Any = self.layers[layer]
        own.pending = False
        return self.packed.attend(self._slot[layer], *args, **kwargs)

    def append(self, layer: int, key: Tensor, *args: Any, **kwargs: Any) -> None:
        """`PackedCache.append`, with the model's layer index."""
        self.packed.append(self._slot[layer], key, *args, **kwargs)
        own: Any = self.layers[layer]
        own.is_initialized = True
        own.columns += key.shape[2]

    @contextlib.contextmanager
    def stepping(self, active: Tensor) -> Iterator[None]:
        """Run a pass of single tokens that the device alone counts, as it will be replayed from a CUDA graph.

        Args:
            active: [1] bool on the device; where it is False, nothing is written. `advance` tells the host afterwards.
        """
        columns = [(layer, layer.columns) for layer in self.layers if isinstance(layer, SPKVLayer)]
        self.active = active
        try:
            with self.packed.uncounted():
                yield
        finally:
            self.active = None
            for layer, before in columns:
                layer.columns, layer.pending = before, False

    def advance(self, columns: int) -> None:
        """So many tokens more were written inside `stepping`."""
        for layer in self.layers:
            if isinstance(layer, SPKVLayer):
                layer.columns += columns

    @property
    def nbytes(self) -> int:
        """Bytes allocated: the pool with its tables and free pages, and what local layers hold."""
        layers: list[Any] = self.layers
        local = (t for layer in layers for t in (layer.keys, layer.values) if isinstance(t, Tensor))
        return self.packed.nbytes + sum(t.numel() * t.element_size() for t in local)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that a dense cache of the same tokens would take: global layers in full, local layers as they are."""
        if not self.packed.sequences:
            return 0
        pairs = int(self.packed.seen.sum()) * self.packed.kv_heads
        return pairs * self.packed.pair_bytes + self.nbytes - self.packed.nbytes

    def density(self) -> float | None:
        """Kept pairs / pairs that have left the window, over all global layers; None if none has left it."""
        left = int(self.packed.left_window().sum()) * self.packed.kv_heads if self.packed.sequences else 0
        return int(self.packed.kept_pairs().sum()) / left if left else None

    def kept_fraction(self) -> float | None:
        """(Kept + window) pairs held / pairs a dense cache would hold, over all global layers; None when empty."""
        if not self.packed.sequences or not int(self.packed.seen.sum()):
            return None
        in_window = int(self.packed.seen.clamp_max(self.window).sum()) * self.packed.kv_heads
        return (int(self.packed.kept_pairs().sum()) + in_window) / (int(self.packed.seen.sum()) * self.packed.kv_heads)

    def density_by_head(self) -> Tensor:
        """[global layers, Hkv] float64 on the CPU: density over the batch; nan where no pair has left the window."""
        if not self.packed.sequences:
            return torch.full((len(self.global_layers), self.packed.kv_heads), float("nan"), dtype=torch.float64)
        kept = self.packed.kept_pairs().sum(1).double().cpu()
        return kept / self.packed.left_window().sum(1, keepdim=True).double().cpu()

    def kept_fraction_by_head(self) -> Tensor:
        """[global layers, Hkv] float64 on the CPU: pairs held / pairs seen; nan where nothing was seen."""
        if not self.packed.sequences:
            return torch.full((len(self.global_layers), self.packed.kv_heads), float("nan"), dtype=torch.float64)
        held = self.packed.kept_pairs().sum(1) + self.packed.seen.clamp_max(self.window).sum(1, keepdim=True)
        return (held.double() / self.packed.seen.sum(1, keepdim=True).double()).cpu()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:  # type: ignore[override]
        """Sequence i becomes what sequence beam_idx[i] was (beam search)."""
        self.packed.select(beam_idx)
        super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the named sequences, in that order."""
        self.packed.select(indices)
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times, in place."""
        layers: list[Any] = self.layers
        for layer in layers:
            if not isinstance(layer, SPKVLayer):
                layer.batch_repeat_interleave(repeats)
        self.packed.select(torch.arange(self.packed.sequences).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything."""
        self.layers = self._new_layers()
        self.packed.reset()
