"""Attach the utility predictor to a transformers model, and detach it again.

Attaching adds predictors and hooks (`forward.py` says what they do) and selects the attention function. Nothing
global changes but three entries in transformers' registries.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from spkv.config import PageDtype, SPKVConfig, check_threshold
from spkv.gates import Gate, HardGate, LayoutGate, OpenGate, ThresholdGate
from spkv.hf import forward, graph
from spkv.hf.cache import SPKVCache
from spkv.hf.families import Decoder, find_decoder
from spkv.predictor import UtilityPredictor


class Record:
    """Utilities of the forward passes run inside `Attachment.record()`.

    No dataclass: FSDP copies those that it finds among keywords, and what is entered in a copy is lost.

    Attributes:
        utilities: layer index -> [B, Hkv, T] float32, of the latest pass, with their graph.
    """

    def __init__(self) -> None:
        self.utilities: dict[int, Tensor] = {}


class Attachment:
    """What `attach` added to a model, and the switches of its forward pass.

    Attributes:
        config: the SPKVConfig.
        decoder: the decoder stack and its attentions.
        layers: indices of the layers with a predictor; other global layers keep every pair, unless there is a layout.
        gate: the gate in force; `default_gate` unless training or an evaluation sets another.
        oracle: True computes passes without a cache through a dense mask, for tests and evaluation.
        max_memory: bytes that a cache made by `generate()` may take at most; None for no bound.
        page_dtype: how its kept pairs are coded; as in `SPKVConfig`, whose value it starts with.
        predictor_stream: what predictors run on, if not the stream of the rest; see `concurrent_projections`.
        decided: when what runs there is done, until somebody has waited for it.
        observer: called by every global layer of a pass that fills a cache; see `observing`.
        training: what the checkpoint that was loaded remembers of its training; any JSON.
    """

    def __init__(self, decoder: Decoder, config: SPKVConfig, layers: tuple[int, ...]):
        self.decoder, self.config, self.layers = decoder, config, layers
        self.gate: Gate = self.default_gate
        self.oracle = False
        self.max_memory: int | None = None
        self.page_dtype: PageDtype = config.page_dtype
        self.predictor_stream: torch.cuda.Stream | None = None
        self.decided: torch.cuda.Event | None = None
        self.observer: forward.Observer | None = None
        self.training: dict[str, Any] = {}
        self.suspended = False
        self.context: forward.ForwardContext | None = None  # of the pass under way, where keywords do not carry it
        self._record: Record | None = None
        self._handles: list[Any] = []
        self.implementation_name = f"spkv_{decoder.config._attn_implementation}"
        self.original_implementation: str = decoder.config._attn_implementation

    @property
    def default_gate(self) -> HardGate:
        """The gate that the config asks for."""
        config = self.config
        return ThresholdGate(config.threshold) if config.layout is None else LayoutGate(config.layout, config.sinks)

    def join_predictor(self, *_: Any) -> None:
        """Let the current stream wait for what runs on the predictors' own."""
        if self.decided is not None:
            torch.cuda.current_stream().wait_event(self.decided)
            self.decided = None

    def gate_of(self, layer: int, gate: Gate | None = None) -> Gate:
        """What a global layer makes of `gate`, or of the one in force.

        Without a predictor it keeps everything, unless a static layout says what it keeps.
        """
        gate = self.gate if gate is None else gate
        return gate if layer in self.layers or self.config.layout is not None else OpenGate()

    def keep(self, layer: int, utility: Tensor, position: Tensor, gate: Gate | None = None) -> Tensor:
        """What a global layer keeps, [B, Hkv, T] bool, under the gate in force or another.

        Args:
            layer: its index in the model.
            utility: [B, Hkv, T]; anything where the layer has no predictor.
            position: [B or 1, T].
            gate: a hard one; None for the one in force.

        Raises:
            ValueError: if the gate is soft.
        """
        gate = self.gate_of(layer, gate)
        if not isinstance(gate, HardGate):
            raise ValueError(f"a hard gate is needed, which keeps or drops, not {type(gate).__name__}")
        return gate.keep(utility, layer=layer, position=position)

    def layout_density(self) -> float:
        """Share of the KV heads in global layers that a static layout keeps; sinks not counted."""
        assert self.config.layout is not None
        heads = len(self.decoder.global_layers) * self.decoder.kv_heads
        return sum(map(len, self.config.layout)) / heads

    @property
    def predictors(self) -> dict[int, UtilityPredictor]:
        """Layer index -> its predictor."""
        attentions: list[Any] = self.decoder.attentions
        return {i: attentions[i].utility_predictor for i in self.layers}

    @property
    def threshold(self) -> float:
        """The threshold in force; setting it puts a `ThresholdGate` in place."""
        return getattr(self.gate, "threshold", self.config.threshold)

    @threshold.setter
    def threshold(self, value: float) -> None:
        if self.config.layout is not None:
            raise ValueError("this model has a static layout and no utilities, so a threshold decides nothing")
        self.gate = ThresholdGate(check_threshold(value))

    @contextlib.contextmanager
    def using(self, gate: Gate) -> Iterator[None]:
        """Put another gate in force for a while."""
        before, self.gate = self.gate, gate
        try:
            yield
        finally:
            self.gate = before

    @contextlib.contextmanager
    def record(self) -> Iterator[Record]:
        """Collect the utilities of the forward passes inside."""
        before, self._record = self._record, Record()
        try:
            yield self._record
        finally:
            self._record = before

    @contextlib.contextmanager
    def observing(self, observer: forward.Observer) -> Iterator[None]:
        """Show the queries, keys and decisions of the passes inside to `observer`, layer by layer."""
        before, self.observer = self.observer, observer
        try:
            yield
        finally:
            self.observer = before

    def new_cache(self, max_memory: int | None = None, page_dtype: PageDtype = None) -> SPKVCache:
        """An empty cache for this model; what is None is taken from the attachment."""
        return SPKVCache(
            self.decoder,
            self.config.window,
            self.config.page_size,
            self.max_memory if max_memory is None else max_memory,
            self.page_dtype if page_dtype is None else page_dtype,
        )

    def check_cache(self, cache: SPKVCache) -> None:
        """Raise a ValueError if `cache` was made for another model or window."""
        if cache.global_layers != self.decoder.global_layers or cache.window != self.config.window:
            raise ValueError(
                f"the SPKVCache given is for global layers {list(cache.global_layers)} and window {cache.window}; "
                f"this model has {list(self.decoder.global_layers)} and {self.config.window}"
            )


def attach(model: PreTrainedModel, config: SPKVConfig | None = None) -> PreTrainedModel:
    """Add utility predictors to a causal language model, in place, and make `generate()` use a self-pruned cache.

    The new predictors start with open gates (initial_bias), untrained: load trained ones with `spkv.load`.

    Args:
        model: a transformers causal LM of a supported family.
        config: None takes the defaults.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: if the model, a layer named in the config, or its attention cannot be supported.
    """
    config = config or SPKVConfig()
    if find_attachment(model) is not None:
        raise ValueError("the model already has an attachment; call spkv.detach(model) first")
    decoder = find_decoder(model)
    layers = decoder.global_layers if config.layers is None else config.layers
    if config.layout is not None:
        _check_layout(decoder, config.layout)
        layers = ()
    refused = [i for i in layers if i not in decoder.global_layers]
    if refused:
        raise ValueError(
            f"layers {refused} are not global attention layers of this model; those are {list(decoder.global_layers)}"
        )
    if isinstance(config.page_dtype, tuple) and len(config.page_dtype) != len(decoder.attentions):
        raise ValueError(
            f"page_dtype has {len(config.page_dtype)} entries, and the model has {len(decoder.attentions)} layers"
        )
    if getattr(decoder.config, "attention_dropout", 0.0):
        raise ValueError(
            f"attention_dropout is {decoder.config.attention_dropout}; gated attention has no dropout, set it to 0"
        )
    attachment = Attachment(decoder, config, layers)
    for index in decoder.global_layers:
        attention = decoder.attentions[index]
        if index in layers:
            weight = _reference_weight(attention, index)
            attention.utility_predictor = UtilityPredictor(
                decoder.config.hidden_size,
                decoder.kv_heads,
                config.predictor_width,
                config.initial_bias,
                config.predictor_depth,
            ).to(weight.device, weight.dtype)
        hook = functools.partial(forward.attention_pre_hook, attachment)
        attachment._handles.append(attention.register_forward_pre_hook(hook, with_kwargs=True))
    attachment._handles.append(decoder.module.register_forward_pre_hook(forward.decoder_pre_hook, with_kwargs=True))
    attachment._handles.append(decoder.module.register_forward_hook(forward.decoder_post_hook, always_call=True))
    module: Any = decoder.module
    module.spkv_attachment = attachment
    _set_implementation(attachment, active=True)
    if model.can_generate():
        # On the instance, in front of the class's: graph.py says why.
        instance: Any = model
        instance.generate = functools.partial(graph.generate, model, attachment, instance.generate)
    return model


def _check_layout(decoder: Decoder, layout: tuple[tuple[int, ...], ...]) -> None:
    if len(layout) != len(decoder.attentions):
        raise ValueError(f"the layout has {len(layout)} layers, and the model {len(decoder.attentions)}")
    for layer, heads in enumerate(layout):
        allowed = decoder.kv_heads if layer in decoder.global_layers else 0
        if heads and heads[-1] >= allowed:
            raise ValueError(
                f"the layout names KV heads {list(heads)} of layer {layer}, which has "
                + (f"{allowed}" if allowed else "a sliding window by design")
            )


def _reference_weight(attention: nn.Module, layer: int) -> nn.Parameter:
    """A weight whose type and device the predictor takes: floating, and not quantised to a byte."""
    for weight in attention.parameters():
        if weight.is_floating_point() and weight.element_size() > 1:
            return weight
    raise ValueError(
        f"the attention of layer {layer} has no floating-point weights of 16 bits or more; quantised models are not "
        "supported"
    )


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach`: the model computes what it computed before, bit for bit (apart from trained weights)."""
    found = attachment(model)
    if found.suspended:
        raise ValueError("a model cannot be detached inside spkv.dense")
    for handle in found._handles:
        handle.remove()
    _set_implementation(found, active=False)
    for index in found.layers:
        del found.decoder.attentions[index].utility_predictor
    del found.decoder.module.spkv_attachment
    modules: list[Any] = list(model.modules())
    for module in modules:
        ours = vars(module).get("generate")
        if getattr(ours, "func", None) is graph.generate:
            del module.generate
            if module.generate != ours.args[2]:  # somebody else's stood there before
                module.generate = ours.args[2]
    return model


def attachment(model: nn.Module) -> Attachment:
    """Return the attachment of a model, also of one wrapped by PEFT or DistributedDataParallel.

    Raises:
        ValueError: if the model has none.
    """
    found = find_attachment(model)
    if found is None:
        raise ValueError(f"this {type(model).__name__} has no attachment; call spkv.attach or spkv.load first")
    return found


def find_attachment(model: nn.Module) -> Attachment | None:
    """Return the attachment of a model, or None."""
    modules: Iterator[Any] = model.modules()
    return next((m.spkv_attachment for m in modules if hasattr(m, "spkv_attachment")), None)


@contextlib.contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Run an attached model as if it were not attached: its own attention, caches and weights."""
    found = attachment(model)
    if found.suspended:
        yield
        return
    found.suspended = True
    _set_implementation(found, active=False)
    try:
        yield
    finally:
        found.suspended = False
        _set_implementation(found, active=True)


def _set_implementation(attachment: Attachment, active: bool) -> None:
    """Select the attention functions of global and of local layers."""
    decoder, original = attachment.decoder, attachment.original_implementation
    # Masks are made once a pass, from the decoder's config: none for global layers, the original's for local ones.
    name = attachment.implementation_name
    AttentionInterface.register(name, forward.attention)
    local_name = original
    if original == "sdpa":  # what others do with a sliding window is theirs to know
        local_name = f"{name}_local"
        AttentionInterface.register(local_name, forward.local_attention)
    AttentionMaskInterface.register(name, functools.partial(forward.mask, original))
    decoder.config._attn_implementation = name if active else original
    attentions: list[Any] = decoder.attentions
    for index, attention in enumerate(attentions):
        if index in decoder.global_layers:
            attention.config._attn_implementation = name if active else original
        elif active:
            attention.spkv_original_config = attention.config
            attention.config = copy.copy(attention.config)
            attention.config._attn_implementation = local_name
        else:
            attention.config = attention.spkv_original_config
            del attention.spkv_original_config
