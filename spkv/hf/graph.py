"""`generate()` on a GPU: the whole decode step as one CUDA graph, with transformers' own models.

`attach` puts `generate` in front of the model's own. Where a graph can be used, transformers prepares everything as
ever (its generation config, logits processors, stopping criteria) and hands over to `DecodeLoop` where it would start
its own loop. A step is: embed the last tokens, run the model (predictors, writes, attention), process the logits,
choose, stop. All that it reads and changes lies on the device, so the host only replays it, and looks once in a page's
worth of tokens whether all sequences have ended and the pool has pages enough.

Legend: B sequences, T tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationMode,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from spkv.hf.cache import SPKVCache
from spkv.hf.compiled import compiled_parts
from spkv.ops.triton import limits

if TYPE_CHECKING:
    from spkv.hf.attach import Attachment

# Tokens of a pass over the prompt, over all sequences: bounds the memory of activations.
PREFILL_TOKENS = 16_384
# Processors that look at the scores alone, so that they can be part of the graph. Others run after each replay.
_OF_SCORES_ALONE = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
_KNOWN_INPUTS = {"attention_mask", "past_key_values", "use_cache", "position_ids", "logits_to_keep", "cache_position"}


class NotGraphableError(ValueError):
    """What was asked of `generate()` cannot run as a CUDA graph; the message says why."""


def generate(
    model: PreTrainedModel,
    attachment: Attachment,
    original: Callable[..., Any],
    *args: Any,
    cuda_graph: bool | None = None,
    compile: bool = False,
    **kwargs: Any,
) -> Any:
    """`model.generate()` of an attached model: transformers' own, decoding with a CUDA graph where one can be used.

    Args:
        model: the attached model.
        attachment: its attachment.
        original: transformers' `generate`, bound to the model.
        args, kwargs: as transformers takes them.
        cuda_graph: True insists on the graph, False decodes eagerly, None uses it where it can be used: greedy or
            sampled decoding on CUDA, of a model all of whose attention is global.
        compile: also fuse the small operations of a step with torch.compile, which takes some seconds once in a
            process; see `compiled.py`. Needs the graph.

    Raises:
        NotGraphableError: if the graph was insisted on and cannot be used; a ValueError.
    """
    if cuda_graph is False:
        if compile:
            raise NotGraphableError("compile=True needs the CUDA graph, and cuda_graph=False was given")
        return original(*args, **kwargs)
    reason = obstacle(model, attachment)
    for name in ("custom_generate", "assistant_model", "synced_gpus", "streamer"):
        if kwargs.get(name) is not None:
            reason = reason or f"{name} was given"
    if reason is None:
        # A function of its own, since transformers looks at the signature of what it is given.
        def loop(
            model: PreTrainedModel,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: Any,
            **model_kwargs: Any,
        ) -> Any:
            return _decode(
                model,
                attachment,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                model_kwargs,
                compile,
            )

        try:
            return original(*args, custom_generate=loop, **kwargs)
        except NotGraphableError as error:  # raised before anything was computed
            reason = str(error)
    if cuda_graph or compile:
        asked = "cuda_graph=True" if cuda_graph else "compile=True"
        raise NotGraphableError(f"{asked} was asked for and cannot be used: {reason}")
    return original(*args, **kwargs)


def obstacle(model: PreTrainedModel, attachment: Attachment) -> str | None:
    """Why a model cannot decode as a CUDA graph, or None."""
    decoder = attachment.decoder
    if model.device.type != "cuda":
        return f"the model is on {model.device}, and graphs are CUDA's"
    if attachment.suspended or not attachment.gate.hard or model.training:
        return "the model is in training, or inside spkv.dense"
    if len(decoder.global_layers) < len(list(decoder.attentions)):
        return "layers with a sliding window keep caches of transformers, whose shapes change at every token"
    head_size = decoder.config.hidden_size // decoder.config.num_attention_heads
    head_size = getattr(decoder.config, "head_dim", None) or head_size
    reason = limits.attention({"query": torch.empty(1, 1, 1, head_size, dtype=model.dtype, device=model.device)})
    return reason and f"Triton's kernels, which it needs, cannot run: {reason}"


def _decode(
    model: PreTrainedModel,
    attachment: Attachment,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    compile: bool,
) -> Any:
    """What transformers calls in place of its own sampling loop."""
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise NotGraphableError(f"the generation mode is {mode.value}")
    wanted = [
        name
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
        if getattr(generation_config, name, None)
    ]
    if wanted:
        raise NotGraphableError(f"{', '.join(wanted)} was asked for")
    inputs = sorted(name for name, value in model_kwargs.items() if value is not None and name not in _KNOWN_INPUTS)
    if inputs or not model_kwargs.get("use_cache"):
        raise NotGraphableError(f"{', '.join(inputs)} was given" if inputs else "use_cache=False")
    criteria = [c for c in stopping_criteria if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))]
    if criteria:
        raise NotGraphableError(f"the stopping criterion {type(criteria[0]).__name__} looks at every token")
    cache = model_kwargs.get("past_key_values")
    if not isinstance(cache, SPKVCache):
        if cache is not None and cache.get_seq_length():
            raise NotGraphableError("the cache given is none of spkv's")  # transformers' loop says what is wrong
        cache = attachment.new_cache()
    attachment.check_cache(cache)

    logits = _prefill(model, cache, input_ids, model_kwargs.get("attention_mask"), generation_config.prefill_chunk_size)
    ends = next((c.eos_token_id for c in stopping_criteria if isinstance(c, EosTokenCriteria)), None)
    loop = DecodeLoop(
        model,
        cache,
        max_new_tokens=generation_config.max_length - input_ids.shape[1],
        processors=logits_processor,
        sample=bool(generation_config.do_sample),
        ends=ends,
        padding=generation_config._pad_token_tensor,
        prompt=input_ids,
        compile=compile,
    )
    sequences: Any = torch.cat([input_ids, loop.run(logits)], dim=1)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=cache)
    return sequences


def _prefill(
    model: PreTrainedModel, cache: SPKVCache, input_ids: Tensor, attention_mask: Tensor | None, chunk: int | None
) -> Tensor:
    """Read the prompt, or what the cache has not read of it, in chunks; returns [B, V], the next tokens' logits."""
    B, T = input_ids.shape
    past = cache.get_seq_length()
    if attention_mask is not None and attention_mask.shape[1] == past + T and past:
        new_ids = input_ids  # the mask covers what the cache holds, the ids do not
    else:
        new_ids = input_ids[:, past:]
    if not new_ids.shape[1]:
        raise ValueError(f"the cache has read all {past} tokens given already; pass at least one more")
    positions = None
    if attention_mask is not None:
        positions = (attention_mask.long().cumsum(1) - 1).clamp_min(0)[:, past:]
        if bool(attention_mask.all()):
            attention_mask = positions = None
    chunk = chunk or max(256, PREFILL_TOKENS // B)
    for start in range(0, new_ids.shape[1], chunk):
        stop = min(start + chunk, new_ids.shape[1])
        logits = model(
            input_ids=new_ids[:, start:stop],
            attention_mask=None if attention_mask is None else attention_mask[:, : past + stop],
            position_ids=None if positions is None else positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
    return logits[:, -1]  # type: ignore[no-any-return]


class DecodeLoop:
    """Continues sequences whose prompts have been read.

    Args:
        model: the attached model.
        cache: what it holds of the prompts.
        max_new_tokens: the most tokens to make.
        ends: [n] int64, ids that end a sequence, or None.
        padding: the id that follows an ended sequence; needed for several sequences with `ends`.
        processors: of the logits, as transformers made them.
        prompt: [B, T] int64, for processors that look at it.
        sample: draw from the distribution instead of taking the most likely token.
        compile: fuse the small operations of a step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: SPKVCache,
        *,
        max_new_tokens: int,
        ends: Tensor | None = None,
        padding: Tensor | None = None,
        processors: LogitsProcessorList | None = None,
        prompt: Tensor | None = None,
        sample: bool = False,
        compile: bool = False,
    ) -> None:
        self.model, self.cache, self.compile = model, cache, compile
        self.max_new_tokens, self.sample = max_new_tokens, sample
        B, device = cache.packed.sequences, model.device
        self.processors = LogitsProcessorList() if processors is None else processors
        self.prompt = torch.empty(B, 0, dtype=torch.long, device=device) if prompt is None else prompt
        self.ends = None if ends is None else ends.to(device)
        self.padding = None if padding is None else padding.to(device)
        self.token = torch.zeros(B, 1, dtype=torch.long, device=device)  # the latest of each sequence
        # One column more than is handed out: steps past the end write there.
        self.tokens = torch.zeros(B, max_new_tokens + 1, dtype=torch.long, device=device)
        self.count = torch.zeros(1, dtype=torch.long, device=device)  # columns of `tokens` that are filled
        self.unfinished = torch.ones(B, dtype=torch.bool, device=device)
        self.active = torch.ones(1, dtype=torch.bool, device=device)  # there is a sequence to continue

    @torch.no_grad()
    def run(self, logits: Tensor, progress: Callable[[int], None] | None = None) -> Tensor:
        """Choose from [B, V], the logits after the prompts, and go on: returns the new tokens [B, new].

        `progress` is called with the number of tokens made so far, now and then.
        """
        whole = all(isinstance(p, _OF_SCORES_ALONE) for p in self.processors)
        cache = self.cache
        self._accept(logits)
        step, captured = self._step_and_accept if whole else self._step, -1
        left = self.max_new_tokens - 1
        try:
            while left and (self.ends is None or bool(self.active)):
                ready = cache.packed.prepare(min(left, cache.packed.page_size if whole else 1))
                if captured != cache.packed.moves:
                    replay, captured = self._capture(step), cache.packed.moves
                for _ in range(ready):
                    replay()
                cache.packed.spend(ready)
                if not whole:
                    self._accept(self._logits)
                left -= ready
                if progress is not None:
                    progress(self.max_new_tokens - left)
        finally:  # a full pool ends the loop between two steps
            made = int(self.count)
            cache.advance(made - 1)
        return self.tokens[:, :made]

    def _step(self) -> None:
        """Feed the latest tokens to the model. With nothing to continue, the cache stays as it is."""
        with self.cache.stepping(self.active):
            self._logits = self.model(
                input_ids=self.token,
                position_ids=self.cache.packed.seen[0][:, None].long(),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]

    def _step_and_accept(self) -> None:
        self._step()
        self._accept(self._logits)

    def _accept(self, logits: Tensor) -> None:
        """Choose the next tokens from [B, V] and enter them, as transformers does."""
        processors: Any = self.processors
        scores = processors(self._so_far(), logits.float())
        if self.sample:
            # The largest of p / Exp(1) is drawn with probability p: what torch.multinomial does, without its checks,
            # which would wait for the device.
            probabilities = scores.softmax(-1)
            chosen = (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)
        else:
            chosen = scores.argmax(-1)
        if self.ends is not None:
            if self.padding is not None:
                chosen = torch.where(self.unfinished, chosen, self.padding)
            ended = torch.isin(chosen, self.ends)
        chosen = torch.where(self.active, chosen, self.token[:, 0])
        self.token.copy_(chosen[:, None])
        self.tokens.index_copy_(1, self.count, chosen[:, None])
        self.count += self.active
        if self.ends is not None:
            self.unfinished &= ~(ended & self.active)
            self.active &= self.unfinished.any()

    def _so_far(self) -> Tensor:
        """[B, T + new]: what processors may look at; those of a graph do not."""
        if all(isinstance(p, _OF_SCORES_ALONE) for p in self.processors):
            return self.prompt
        return torch.cat([self.prompt, self.tokens[:, : int(self.count)]], dim=1)

    def _capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """A function that does what `step` does, as a graph where that is possible."""
        active, graph = self.active.clone(), torch.cuda.CUDAGraph()
        with compiled_parts(self.model) if self.compile else contextlib.nullcontext():
            # Two runs without a sequence to continue change nothing, but compile kernels and make workspaces.
            self.active.zero_()
            side = torch.cuda.Stream(self.model.device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            self.active.copy_(active)
            try:
                with torch.cuda.graph(graph):
                    step()
            except RuntimeError as error:
                self._warn(error)
                return step
        return graph.replay

    def _warn(self, error: RuntimeError) -> None:
        name = type(self.model).__name__
        warnings.warn(f"{name} cannot be captured in a CUDA graph and decodes eagerly: {error}", stacklevel=3)
