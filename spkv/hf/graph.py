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
import functools
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
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from spkv.cache.pages import PoolFullError
from spkv.config import PageDtype
from spkv.hf.cache import CACHE_KEYWORD, NOT_CROPPABLE, SPKVCache, rename_cache
from spkv.hf.compiled import compiled_parts
from spkv.hf.concurrent import concurrent_projections
from spkv.ops.triton import limits

if TYPE_CHECKING:
    from spkv.hf.attach import Attachment

# Tokens of a pass over the prompt, over all sequences: bounds the memory of activations.
PREFILL_TOKENS = 16_384
# Processors that look at the scores alone, so that they can be part of the graph. Others run after each replay.
_OF_SCORES_ALONE = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
# Arguments of `generate` that transformers' own loop takes. It also makes position_ids itself, where none are given.
_NOT_TAKEN = ("custom_generate", "assistant_model", "synced_gpus", "streamer", "tokenizer", "position_ids")
_KNOWN_INPUTS = {"attention_mask", CACHE_KEYWORD, "use_cache", "position_ids", "logits_to_keep", "cache_position"}


class NotGraphableError(ValueError):
    """What was asked of `generate()` cannot run as a CUDA graph; the message says why."""


def generate(
    model: PreTrainedModel,
    attachment: Attachment,
    original: Callable[..., Any],
    *args: Any,
    cuda_graph: bool | None = None,
    compile: bool = False,
    page_dtype: PageDtype = None,
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
        page_dtype: how the cache that this call makes codes kept pairs, as in `SPKVConfig`; None leaves it to the
            attachment.

    Raises:
        NotGraphableError: if the graph was insisted on and cannot be used; a ValueError.
        ValueError: for assisted decoding, which takes tokens back.
    """
    assisted = any(kwargs.get(name) is not None for name in ("assistant_model", "prompt_lookup_num_tokens"))
    if assisted and not attachment.suspended:
        raise ValueError(NOT_CROPPABLE)
    if page_dtype is not None:
        rename_cache(kwargs)
        if kwargs.get(CACHE_KEYWORD) is not None:
            raise ValueError(f"page_dtype is for a new cache, and {CACHE_KEYWORD} was given")
        kwargs[CACHE_KEYWORD] = attachment.new_cache(page_dtype=page_dtype)
    if cuda_graph is False:
        if compile:
            raise NotGraphableError("compile=True needs the CUDA graph, and cuda_graph=False was given")
        return original(*args, **kwargs)
    reason = obstacle(model, attachment)
    for name in _NOT_TAKEN:
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
                compile=compile,
                insist=bool(cuda_graph or compile),
            )

        try:
            return original(*args, custom_generate=loop, **kwargs)
        except NotGraphableError as error:  # raised before anything was computed, unless the graph was insisted on
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
    if _is_sharded(model):
        return "the model is sharded over processes, which must take as many steps as each other"
    group = decoder.config.num_attention_heads // decoder.kv_heads
    reason = limits.model(attachment.decoder.head_size, group, model.dtype, model.device)
    return reason and f"Triton's kernels, which it needs, cannot run: {reason}"


def _is_sharded(model: PreTrainedModel) -> bool:
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return several and (is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model))


def _decode(
    model: PreTrainedModel,
    attachment: Attachment,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *,
    compile: bool,
    insist: bool,
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
    criteria = [type(c).__name__ for c in stopping_criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)]
    if criteria:
        raise NotGraphableError(f"the stopping criterion {criteria[0]} looks at every token")
    if generation_config.cache_implementation not in (None, "dynamic"):
        raise NotGraphableError(f"cache_implementation={generation_config.cache_implementation!r} was given")
    cache = model_kwargs.get(CACHE_KEYWORD)
    if not isinstance(cache, SPKVCache):
        if cache is not None and cache.get_seq_length():
            raise NotGraphableError("the cache given is none of spkv's")  # transformers' loop says what is wrong
        cache = attachment.new_cache()
    attachment.check_cache(cache)
    for page_dtype in set(cache.packed.page_dtypes):
        if reason := limits.codec(page_dtype, attachment.decoder.head_size, model.device):
            raise NotGraphableError(f"Triton's kernels, which it needs, cannot run: {reason}")

    prompt = input_ids.to(model.device)
    logits = _prefill(model, cache, prompt, model_kwargs.get("attention_mask"), generation_config)
    lengths = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
    ends = [c.eos_token_id for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
    loop = DecodeLoop(
        model,
        cache,
        max_new_tokens=max(1, min(lengths) - prompt.shape[1]),
        ends=torch.cat([end.flatten() for end in ends]) if ends else None,
        padding=generation_config._pad_token_tensor,
        processors=logits_processor,
        prompt=prompt,
        sample=bool(generation_config.do_sample),
        compile=compile,
        insist=insist,
    )
    sequences: Any = torch.cat([input_ids, loop.run(logits).to(input_ids.device)], dim=1)
    if generation_config.return_dict_in_generate:
        held: dict[str, Any] = {CACHE_KEYWORD: cache}
        return GenerateDecoderOnlyOutput(sequences=sequences, **held)
    return sequences


def _prefill(
    model: PreTrainedModel, cache: SPKVCache, input_ids: Tensor, attention_mask: Tensor | None, generation_config: Any
) -> Tensor:
    """Read the prompt, or what the cache has not read of it, in chunks; returns [B, V], the next tokens' logits."""
    B, T = input_ids.shape
    past = cache.get_seq_length()
    # The ids are all those of the mask, or the new ones alone. An absent mask may have had a length once.
    mask_length = getattr(generation_config, "_mask_length", T) if attention_mask is None else attention_mask.shape[1]
    new_ids = input_ids[:, past:] if mask_length == T else input_ids
    if not new_ids.shape[1]:
        raise ValueError(f"the cache has read all {past} tokens given already; pass at least one more")
    positions = None
    if attention_mask is not None:
        attention_mask = attention_mask.to(model.device)
        positions = (attention_mask.long().cumsum(1) - 1).clamp_min(0)[:, past:]
        if bool(attention_mask.all()):
            attention_mask = positions = None
    chunk = generation_config.prefill_chunk_size
    chunk = chunk or max(256, PREFILL_TOKENS // B)
    for start in range(0, new_ids.shape[1], chunk):
        stop = min(start + chunk, new_ids.shape[1])
        logits = model(
            input_ids=new_ids[:, start:stop],
            attention_mask=None if attention_mask is None else attention_mask[:, : past + stop],
            position_ids=None if positions is None else positions[:, start:stop],
            use_cache=True,
            logits_to_keep=1,
            **{CACHE_KEYWORD: cache},
        ).logits
    return logits[:, -1]  # type: ignore[no-any-return]


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that steps are captured on, which goes before what runs beside it. One for all captures, since cuBLAS
    keeps a workspace for each stream.
    """
    return torch.cuda.Stream(device, priority=-1)


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
        insist: raise a NotGraphableError where the step cannot be captured, instead of running it eagerly.
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
        insist: bool = False,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        self.model, self.cache, self.compile, self.insist = model, cache, compile, insist
        self.max_new_tokens, self.sample = max_new_tokens, sample
        B, device = cache.packed.sequences, model.device
        self.processors = LogitsProcessorList() if processors is None else processors
        self.whole = all(isinstance(p, _OF_SCORES_ALONE) for p in self.processors)  # the graph holds the choice, too
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

        Raises:
            PoolFullError: if the cache has no room for another token. It holds all tokens but the latest of each
                sequence, which the error carries: `error.tokens` is what would have been returned.
        """
        device = self.model.device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return self._run(logits, progress)

    def _run(self, logits: Tensor, progress: Callable[[int], None] | None) -> Tensor:
        packed = self.cache.packed
        step = replay = self._step_and_accept if self.whole else self._step
        captured = -1
        self._accept(logits)
        left = self.max_new_tokens - 1
        fed = 0
        packed.make_columns(left)
        try:
            while left and (self.ends is None or bool(self.active)):
                ready = packed.prepare(min(left, packed.page_size if self.whole else 1))
                if captured != packed.moves:
                    replay = step  # lets go of the last graph before the next is captured
                    replay, captured = self._capture(step), packed.moves
                packed.spend(ready)
                for _ in range(ready):
                    replay()
                fed, left = fed + ready, left - ready
                if not self.whole:
                    self._accept(self._logits)
                if progress is not None:
                    progress(self.max_new_tokens - left if self.ends is None else int(self.count))
        except PoolFullError as error:
            error.tokens = self.tokens[:, : int(self.count)]
            raise
        finally:
            # Steps of a graph that follow the last end token take nothing in; single ones know when to end.
            self.cache.advance(int(self.count) - 1 if self.whole else fed)
        return self.tokens[:, : int(self.count)]

    def _step(self) -> None:
        """Feed the latest tokens to the model. With nothing to continue, the cache stays as it is."""
        with self.cache.stepping(self.active):
            self._logits = self.model(
                input_ids=self.token,
                position_ids=self.cache.packed.seen[0][:, None].long(),
                use_cache=True,
                logits_to_keep=1,
                **{CACHE_KEYWORD: self.cache},
            ).logits[:, -1]

    def _step_and_accept(self) -> None:
        self._step()
        self._accept(self._logits)

    def _accept(self, logits: Tensor) -> None:
        """Choose the next tokens from [B, V] and enter them, as transformers does."""
        processors: Any = self.processors
        # transformers chooses from float32, where the largest is the same one.
        scores = processors(self._so_far(), logits.float()) if self.processors or self.sample else logits
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
        if self.whole:
            return self.prompt
        return torch.cat([self.prompt, self.tokens[:, : int(self.count)]], dim=1)

    def _capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """A function that does what `step` does, as a graph where that is possible."""
        device = self.model.device
        active, random_state = self.active.clone(), torch.cuda.get_rng_state(device)
        graph, stream = torch.cuda.CUDAGraph(), _capture_stream(device)
        with contextlib.ExitStack() as around:
            if self.compile:
                around.enter_context(compiled_parts(self.model))
            around.enter_context(concurrent_projections(self.model))
            # Two runs without a sequence to continue change nothing, but compile kernels and make workspaces.
            self.active.zero_()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            self.active.copy_(active)
            torch.cuda.set_rng_state(random_state, device)
            try:
                # The outer context brings the stream back where a capture that fails does not.
                with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, stream=stream):
                    step()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                message = f"{type(self.model).__name__} cannot be captured in a CUDA graph: {error}"
                if self.insist:
                    raise NotGraphableError(message) from error
                warnings.warn(f"{message}; it decodes eagerly", stacklevel=2)
                return step
        return graph.replay
