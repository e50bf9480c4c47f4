"""Projections of one input, side by side in a captured CUDA graph.

A decode step multiplies a few rows by each weight matrix, which takes the time of reading the matrix. Kernels that
small leave multiprocessors idle as they start and end, the narrow ones (keys and values of grouped queries, the
predictor's last layer) nearly always. So those that read the same input are put on streams of their own, which become
branches of the graph: keys, values and the utility predictor run beside the queries and rotary embedding, one half of a
gated MLP beside the other.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Children that a module calls with the input that it was given itself, and which run aside; and the one beside them.
_ASIDE = ((("k_proj", "v_proj"), "q_proj"), (("up_proj",), "gate_proj"))


@contextlib.contextmanager
def concurrent_projections(model: PreTrainedModel) -> Iterator[None]:
    """Inside, projections of one input, and predictors, run on streams of their own; for a captured step, on CUDA."""
    *streams, predictors = _side_streams(model.device)
    with contextlib.ExitStack() as undo:
        for module in list(model.modules()):
            if (attachment := getattr(module, "spkv_attachment", None)) is not None:
                attachment.predictor_stream = predictors
                undo.callback(setattr, attachment, "predictor_stream", None)
                for layer in attachment.layers:
                    # Attention joins it. Where that is not reached, the capture would end with an open branch.
                    attention = attachment.decoder.attentions[layer]
                    undo.callback(attention.register_forward_hook(attachment.join_predictor, always_call=True).remove)
            for names, beside in _ASIDE:
                projections = [getattr(module, name, None) for name in names]
                if hasattr(module, beside) and all(isinstance(projection, nn.Module) for projection in projections):
                    undo.enter_context(_Branches(projections, streams).beside_each_other(module))
        yield


@functools.cache
def _side_streams(device: torch.device) -> list[torch.cuda.Stream]:
    # The same ones for every capture: cuBLAS keeps a workspace for each stream that it has seen.
    return [torch.cuda.Stream(device) for _ in range(1 + max(len(names) for names, _ in _ASIDE))]


class _Branches:
    """Projections that are begun when their parent is called, and joined where it calls them."""

    def __init__(self, projections: list[Any], streams: list[torch.cuda.Stream]) -> None:
        self.projections, self.streams = projections, streams
        # Index of a projection -> its input, its output and when that is there.
        self.begun: dict[int, tuple[Tensor, Tensor, torch.cuda.Event]] = {}

    @contextlib.contextmanager
    def beside_each_other(self, parent: nn.Module) -> Iterator[None]:
        forwards = [projection.forward for projection in self.projections]
        own = [vars(projection).get("forward") for projection in self.projections]
        # Before other pre-hooks: the utility predictor runs in one.
        handles = [
            parent.register_forward_pre_hook(functools.partial(self._begin, forwards), prepend=True, with_kwargs=True),
            parent.register_forward_hook(self._join_all, always_call=True),
        ]
        try:
            for index, (projection, forward) in enumerate(zip(self.projections, forwards, strict=True)):
                projection.forward = functools.partial(self._join, index, forward)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for projection, before in zip(self.projections, own, strict=True):
                del projection.forward
                if before is not None:
                    projection.forward = before

    def _begin(
        self, forwards: list[Callable[[Tensor], Tensor]], parent: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(given, Tensor):
            return
        for index, (forward, stream) in enumerate(zip(forwards, self.streams, strict=False)):
            # What a stream allocates it may use again only behind this point, where earlier outputs have been read.
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.begun[index] = given, forward(given), stream.record_event()

    def _join(self, index: int, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The projection as its parent calls it; for another input than the parent's it is computed as ever."""
        given, output, there = self.begun.pop(index, (None, None, None))
        if there is not None:
            torch.cuda.current_stream().wait_event(there)
        if output is not None and not kwargs and len(args) == 1 and args[0] is given:
            return output
        return forward(*args, **kwargs)

    def _join_all(self, *_: Any) -> None:
        """Wait for what the parent did not call, or the capture would end with an open branch."""
        for *_outputs, there in self.begun.values():
            torch.cuda.current_stream().wait_event(there)
        self.begun.clear()
