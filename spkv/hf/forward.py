"""The forward pass of an attached model.

A pre-hook on the decoder chooses the cache and hands a `ForwardContext` down as a keyword; a pre-hook on every global
attention computes utilities from the layer's input and adds them; transformers passes keywords on to the attention
function, which alone meets the cache.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from spkv.gates import Gate, HardGate, OpenGate, ThresholdGate, open_sinks, sink_mask
from spkv.hf.cache import CACHE_KEYWORD, SPKVCache, rename_cache
from spkv.ops.attention import gated_attention, pruned_prefill
from spkv.ops.triton import limits

if TYPE_CHECKING:
    from spkv.hf.attach import Attachment, Record

_KEYWORD = "spkv"


class Observer(Protocol):
    """Sees what a layer attends with: layer index, query [B, H, T, D] and key [B, Hkv, T, D] after rotary embedding,
    keep [B, Hkv, T]; and the operator's options scale, softcap and sinks."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, keep: Tensor, **options: Any) -> None: ...


@dataclass(frozen=True)
class ForwardContext:
    """What one forward pass of the decoder knows, handed down to its attentions as a keyword.

    Attributes:
        attachment: the model's attachment.
        gate: the gate in force.
        position: [B or 1, T], each token's index in its own sequence.
        sink: [B or 1, 1, T] bool, where `SPKVConfig.sinks` keeps a pair, or None.
        cache: the cache to write to, or None.
        valid: [B, T] bool, False at padding, or None.
        segment_ids: [B, T], or None; set without a cache only.
        padded: the same with padding as a segment of its own, or None without padding or with a cache.
        record: where utilities go, or None.
        utility: [B, Hkv, T], once the attention's pre-hook has run.
        keep: [B, Hkv, T] bool, what a hard gate makes of it where there is a cache.
    """

    attachment: Attachment
    gate: Gate
    position: Tensor
    sink: Tensor | None
    cache: SPKVCache | None
    valid: Tensor | None
    segment_ids: Tensor | None
    padded: PaddedSegments | None
    record: Record | None
    utility: Tensor | None = None
    keep: Tensor | None = None


class PaddedSegments:
    """Segment ids in which padding is a segment of its own, for all layers of a pass alike.

    Args:
        valid: [B, T] bool, False at padding.
        segment_ids: [B, T], or None.
    """

    def __init__(self, valid: Tensor, segment_ids: Tensor | None):
        self.valid, self.segment_ids = valid, segment_ids

    @functools.cached_property
    def ids(self) -> Tensor:
        """[B, T]; made when the first layer asks, since not all kinds of attention do.

        Raises:
            ValueError: if padding lies between tokens of a row, where distances in columns and in tokens differ.
        """
        valid = self.valid
        if bool(((valid[:, 1:] != valid[:, :-1]).sum(1) > 1).any()):
            raise ValueError("attention_mask has padding between tokens; without a cache it may stand at the ends only")
        segments = torch.ones_like(valid, dtype=torch.long) if self.segment_ids is None else self.segment_ids
        return segments.masked_fill(~valid, -1)


def mask(original: str, *args: Any, local_size: int | None = None, **kwargs: Any) -> Any:
    """The mask function of attached models: gated attention needs none, local layers take the original's."""
    if local_size is None:
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[original](*args, local_size=local_size, **kwargs)


def decoder_pre_hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Choose the cache, read the padding, and pass a ForwardContext down as a keyword."""
    found: Attachment = module.spkv_attachment
    rename_cache(kwargs)
    if found.suspended:
        if isinstance(kwargs.get(CACHE_KEYWORD), SPKVCache):
            raise ValueError("an SPKVCache cannot be used inside spkv.dense: dense attention needs every pair")
        return None
    if module.config._attn_implementation != found.implementation_name:
        raise ValueError(
            f"attn_implementation was changed to {module.config._attn_implementation!r} after spkv.attach; "
            "detach first, or attach again"
        )
    arguments = dict(inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments)
    arguments.pop("self")
    kwargs = {**arguments, **arguments.pop("kwargs", {})}
    kwargs.pop("kwargs", None)
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions=True is not supported: gated attention never forms the weights")
    inputs = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if inputs is None:
        return None  # transformers has its own error for this
    cache = _choose_cache(found, module, kwargs)
    kwargs[CACHE_KEYWORD] = cache
    kwargs["use_cache"] = cache is not None
    B, T = inputs.shape[:2]
    past = 0 if cache is None else cache.get_seq_length()
    if cache is None or cache.active is None:
        valid = _valid_tokens(kwargs.get("attention_mask"), B, T, past, cache)
    else:
        valid = cache.active.expand(B)[:, None]
    if T == 1 and cache is not None and cache.packed.sequences:
        cache.packed.prepare(1)  # a full pool says so before the first layer has taken the token
    segment_ids = kwargs.pop("segment_ids", None)
    if segment_ids is not None and cache is not None:
        raise ValueError("segment_ids (packed documents) cannot be combined with a cache; pass use_cache=False")
    position = kwargs.get("position_ids")
    if position is None and segment_ids is not None:
        # Local layers tell documents apart by positions that start again.
        kwargs["position_ids"] = position = _positions_in_segments(segment_ids)
    elif position is None:
        index = torch.arange(T, device=inputs.device)[None] if valid is None else valid.cumsum(1) - 1
        # Not `past`, which counts a row's padding, too.
        seen = 0 if cache is None or not cache.packed.sequences else cache.packed.seen[0][:, None]
        position = (seen + index).clamp_min(0)
    padded = None if valid is None or cache is not None else PaddedSegments(valid, segment_ids)
    if found._record is not None:
        found._record.utilities = {}
    sink = sink_mask(position, found.config.sinks)
    context = ForwardContext(found, found.gate, position, sink, cache, valid, segment_ids, padded, found._record)
    if found.decoder.family.passes_keywords:
        return (), {**kwargs, _KEYWORD: context}
    if module.training and getattr(module, "gradient_checkpointing", False):
        raise ValueError(f"gradient checkpointing is not supported for {module.config.model_type} models")
    found.context = context
    return (), kwargs


def decoder_post_hook(module: Any, args: Any, output: Any) -> None:
    """The pass is over, or has failed."""
    module.spkv_attachment.context = None


def _choose_cache(found: Attachment, module: Any, kwargs: dict[str, Any]) -> SPKVCache | None:
    """The cache of this pass: ours if one was given, a new one in place of an absent or empty one, or None."""
    given: Any = kwargs.get(CACHE_KEYWORD)
    asked = given is not None or kwargs.get("use_cache") is True  # as `generate()` does, one way or the other
    use_cache = module.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
    if isinstance(given, SPKVCache):
        if not found.gate.hard:
            raise ValueError(f"a cache needs a hard gate, and {type(found.gate).__name__} is in force")
        found.check_cache(given)
        return given
    if given is not None:
        if hasattr(given, "spkv_cache"):  # an empty one that an earlier pass replaced
            return given.spkv_cache
        offloading = getattr(given, "offloading", False)
        if type(given) is not DynamicCache or offloading:
            kind = f"{'an offloading' if offloading else 'a'} {type(given).__name__}"
            raise ValueError(
                f"{kind} cannot hold self-pruned pairs; leave past_key_values and "
                "cache_implementation unset, or pass an SPKVCache (spkv.attachment(model).new_cache())"
            )
        if given.get_seq_length():
            raise ValueError(
                f"the DynamicCache given already holds {given.get_seq_length()} tokens, which cannot be pruned "
                "afterwards; start from an empty cache or an SPKVCache"
            )
    if not found.gate.hard or (module.training and torch.is_grad_enabled()):
        if asked:
            raise ValueError(
                "a model in training cannot fill a cache: call model.eval(), put a hard gate in force "
                "(spkv.attachment(model).threshold = 0.5), or pass use_cache=False"
            )
        return None
    if not use_cache:
        return None
    cache = found.new_cache()
    if given is not None:
        given.spkv_cache = cache
    return cache


def _positions_in_segments(segment_ids: Tensor) -> Tensor:
    """[B, T]: each token's distance to the first token of its run of equal ids."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(1).values


def _valid_tokens(attention_mask: Any, batch: int, tokens: int, past: int, cache: SPKVCache | None) -> Tensor | None:
    """[B, T] bool, False at padding, or None if all tokens of this pass are real."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != (batch, past + tokens):
        given = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(
            f"attention_mask must have shape [batch, seen + new tokens] = {[batch, past + tokens]}, "
            f"not {given}; masks of other forms are not supported"
        )
    if tokens > 1 and cache is not None and cache.packed.sequences:
        masked, seen = attention_mask[:, :past].bool().sum(1).tolist(), cache.packed.seen[0].tolist()
        if masked != seen:
            raise ValueError(
                f"attention_mask marks {masked} earlier tokens as real, but the cache was filled with {seen}: tokens "
                "cannot be masked once they are in the cache"
            )
    valid = attention_mask[:, past:].bool()
    return None if bool(valid.all()) else valid


def attention_pre_hook(found: Attachment, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute the utilities of a layer's input and add them to the context."""
    context: ForwardContext | None = kwargs.get(_KEYWORD, found.context)
    if context is None:
        return None
    if module.layer_idx not in found.layers:
        return args, {**kwargs, _KEYWORD: context}
    hidden_states = args[0] if args else kwargs["hidden_states"]
    if found.predictor_stream is None:
        utility, keep = _utility_and_keep(context, module, hidden_states)
    else:
        found.predictor_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(found.predictor_stream):
            try:
                utility, keep = _utility_and_keep(context, module, hidden_states)
            finally:
                found.decided = found.predictor_stream.record_event()
    return args, {**kwargs, _KEYWORD: dataclasses.replace(context, utility=utility, keep=keep)}


def _utility_and_keep(context: ForwardContext, module: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
    """Utilities of an attention's input, and what a hard gate keeps of it where there is a cache."""
    predictor, gate, keep = module.utility_predictor, context.gate, None
    if predictor.decide is not None and isinstance(gate, ThresholdGate):
        utility, keep = predictor.decide(hidden_states, gate.threshold)
    else:
        utility = predictor(hidden_states)
    utility = open_sinks(utility, context.sink)
    if keep is not None and context.sink is not None:
        keep = keep | context.sink
    if context.record is not None:
        # Not what gradient checkpointing computes again: kept to the end, it would hold the memory that this saves.
        context.record.utilities.setdefault(module.layer_idx, utility)
    if context.cache is None:
        return utility, None
    if keep is None:
        # Here and not where it is needed: in a captured graph this runs beside the projections.
        keep = context.attachment.keep(module.layer_idx, utility, context.position, gate)
    context.cache.expect(module.layer_idx, keep, context.valid)
    return utility, keep


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    spkv: ForwardContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of global layers, as transformers calls it: returns [B, T, H, D] and no weights."""
    if spkv is None:
        raise ValueError("the decoder of an attached model must be called as a whole, not layer by layer")
    spkv.attachment.join_predictor()
    query, key, value = _of_one_dtype(query, key, value)
    options: dict[str, Any] = dict(scale=scaling, softcap=softcap, sinks=s_aux)
    layer, window = module.layer_idx, spkv.attachment.config.window
    utility = query.new_ones(key.shape[:3], dtype=torch.float32) if spkv.utility is None else spkv.utility
    gate = spkv.attachment.gate_of(layer, spkv.gate)
    if spkv.cache is not None:
        keep = spkv.keep
        if keep is None:
            keep = spkv.attachment.keep(layer, utility, spkv.position, spkv.gate)
        if spkv.attachment.observer is not None:
            spkv.attachment.observer(layer, query, key, keep, **options)
        out = spkv.cache.attend(layer, query, key, value, keep, spkv.valid, **options)
    elif (
        isinstance(gate, HardGate)
        and spkv.segment_ids is None
        and not spkv.attachment.oracle
        and not torch.is_grad_enabled()
    ):
        keep = gate.keep(utility, layer=layer, position=spkv.position)
        out = pruned_prefill(query, key, value, keep, window=window, valid=spkv.valid, **options)
    else:
        # Open gates add nothing, and attention without a gate costs less.
        is_open = isinstance(gate, OpenGate)
        log_gate = None if is_open else gate.log_gate(utility, layer=layer, position=spkv.position)
        segment_ids = spkv.segment_ids if spkv.padded is None else spkv.padded.ids
        out = gated_attention(
            query,
            key,
            value,
            log_gate,
            window=window,
            segment_ids=segment_ids,
            **options,
        )
    return out.transpose(1, 2).contiguous(), None


def local_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sliding_window: int | None = None,
    spkv: ForwardContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of local layers where it was SDPA, which computes all pairs of a row and masks most.

    Packed rows, of training and evaluation, go through our kernel where it can run, and the mask stays unread. All else
    is left to SDPA.
    """
    segment_ids = None if spkv is None or spkv.valid is not None else spkv.segment_ids
    plain = kwargs.get("softcap") is None and kwargs.get("s_aux") is None
    if segment_ids is None or sliding_window is None or not plain or not _runs_kernels(query):
        out, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out, weights
    query, key, value = _of_one_dtype(query, key, value)
    out = gated_attention(
        query,
        key,
        value,
        window=sliding_window,
        scale=kwargs.get("scaling"),
        segment_ids=segment_ids,
        sliding=True,
    )
    return out.transpose(1, 2).contiguous(), None


def _runs_kernels(query: Tensor) -> bool:
    return limits.attention(dict(query=query)) is None


def _of_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast rotary embedding leaves queries and keys in float32, beside half-precision values."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)
