"""Reading a text and continuing it, measured: what `spkv generate`, `spkv demo` and the evaluations have in common.

Works on attached models, on attached models inside `spkv.dense`, and on plain ones. A text is read in chunks, each a
forward pass of the model with its cache, so everything measured here went through the cache that serves.

Legend: B sequences, T tokens, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from spkv.hf.attach import attachment, find_attachment
from spkv.hf.cache import CACHE_KEYWORD, SPKVCache
from spkv.hf.graph import DecodeLoop, obstacle

CHUNK_SIZE = 1024
# Positions whose logits are held in float32 at once, for the loss.
_LOSS_POSITIONS = 256


@dataclass(frozen=True)
class Reading:
    """A text that has been read.

    Attributes:
        cache: what the model holds of it.
        next_logits: [B, V], of the token after the text.
        seconds: time spent in the decoder, the output layer left out: only serving's last position needs that.
        loss: mean next-token cross-entropy (nats) over the B * (T - 1) predictions in the text; None if not asked for.
        utilities: layer index -> [B, Hkv, T] float32 on the CPU, for the layers with a predictor; if asked for.
    """

    cache: Cache
    next_logits: Tensor
    seconds: float
    loss: float | None = None
    utilities: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheSize:
    """How much of the dense cache is held, and the bytes it takes.

    Attributes:
        density: kept pairs / pairs that left the window; 1 for a dense cache, None if none has left it.
        kept_fraction: pairs held / pairs that a dense cache would hold.
        kv_bytes: bytes of the cache's tensors.
        dense_kv_bytes: bytes that a dense cache of the same tokens takes.
    """

    density: float | None
    kept_fraction: float | None
    kv_bytes: int
    dense_kv_bytes: int


@dataclass(frozen=True)
class Generation:
    """A continuation with its measurements.

    Attributes:
        text: the new text, special tokens left out.
        prompt_tokens, new_tokens: numbers of tokens; an end token that stopped the generation is counted.
        density, kept_fraction, kv_bytes, dense_kv_bytes: as in `CacheSize`, at the end.
        prefill_seconds: one forward of the prompt.
        decode_tokens_per_second: of the forwards of single tokens; None if there was none.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    density: float | None
    kept_fraction: float | None
    kv_bytes: int
    dense_kv_bytes: int
    prefill_seconds: float
    decode_tokens_per_second: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@torch.no_grad()
def read(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    chunk_size: int = CHUNK_SIZE,
    loss: bool = False,
    record: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Reading:
    """Read a text, or several of equal length, into a new cache.

    Args:
        model: a causal LM in evaluation mode, attached or not.
        input_ids: [B, T] int64, without padding.
        chunk_size: C, tokens of a forward pass.
        loss: also compute the loss. Costs the output layer at every position; it is not in `seconds`.
        record: also collect the utilities; the model must be attached and not inside `spkv.dense`.
        progress: called with the number of tokens read so far, after each chunk.

    Raises:
        ValueError: for an empty text, one that exceeds the model's positions, or an impossible chunk size.
    """
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids must be [sequences, tokens] and not empty, got shape {list(input_ids.shape)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    B, T = input_ids.shape
    check_length(model.config, T)
    found = find_attachment(model)
    if model.training or (found is not None and not found.suspended and not found.gate.hard):
        raise ValueError("reading fills a cache: call model.eval(), and put a hard gate in force")
    input_ids = input_ids.to(model.device)
    cache: Cache | None = None
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    pieces: dict[int, list[Tensor]] = {}
    with _decoder_clock(model) as clock, attachment(model).record() if record else nullcontext() as recorded:
        for start in range(0, T, chunk_size):
            chunk = input_ids[:, start : start + chunk_size]
            passed: dict[str, Any] = {CACHE_KEYWORD: cache, "use_cache": True, "logits_to_keep": 0 if loss else 1}
            output = model(input_ids=chunk, **passed)
            cache = output[CACHE_KEYWORD]
            if loss:
                total += _cross_entropy(output.logits, input_ids[:, start + 1 : start + chunk_size + 1])
            if recorded is not None:
                for layer, utility in recorded.utilities.items():
                    pieces.setdefault(layer, []).append(utility.cpu())
            if progress is not None:
                progress(min(start + chunk_size, T))
    assert cache is not None
    return Reading(
        cache=cache,
        next_logits=output.logits[:, -1],
        seconds=clock.seconds,
        loss=total.item() / (B * (T - 1)) if loss and T > 1 else None,
        utilities={layer: torch.cat(parts, dim=2) for layer, parts in pieces.items()},
    )


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    reading: Reading,
    max_new_tokens: int,
    *,
    stop: Collection[int] = (),
    progress: Callable[[int], None] | None = None,
) -> tuple[list[int], float]:
    """Continue one text greedily, token by token; its cache grows by the tokens fed back.

    On CUDA the steps are a replayed graph where `hf/graph.py` can make one.

    Args:
        model: the model that read it.
        reading: of a single sequence.
        max_new_tokens: tokens to make at most; the first one costs no forward pass.
        stop: ids that end the continuation; the one met is its last token.
        progress: called with the number of tokens made so far.

    Returns:
        The new ids, and the seconds that their len - 1 forward passes took, with the capture of a graph.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if reading.next_logits.shape[0] != 1:
        raise ValueError(f"one sequence is decoded at a time, not {reading.next_logits.shape[0]}")
    start = _now(model.device)
    found = find_attachment(model)
    if found is not None and isinstance(reading.cache, SPKVCache) and obstacle(model, found) is None:
        ends = torch.tensor(sorted(stop), device=model.device) if stop else None
        loop = DecodeLoop(model, reading.cache, max_new_tokens=max_new_tokens, ends=ends)
        ids: list[int] = loop.run(reading.next_logits, progress)[0].tolist()
        return ids, _now(model.device) - start
    token = reading.next_logits.argmax(-1, keepdim=True)
    passed: dict[str, Any] = {CACHE_KEYWORD: reading.cache, "use_cache": True, "logits_to_keep": 1}
    new_ids = [int(token)]
    while len(new_ids) < max_new_tokens and new_ids[-1] not in stop:
        logits = model(input_ids=token, **passed).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        new_ids.append(int(token))
        if progress is not None:
            progress(len(new_ids))
    return new_ids, _now(model.device) - start


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Tensor,
    *,
    max_new_tokens: int = 128,
    progress: Callable[[int], None] | None = None,
) -> Generation:
    """Continue a prompt greedily and measure: `model.generate()` with a stopwatch.

    Args:
        model: a causal LM in evaluation mode, attached or not, or attached and inside `spkv.dense`.
        tokenizer: turns the new tokens into text.
        prompt_ids: [1, T] int64.
        max_new_tokens: tokens to make at most; fewer if the model ends its text.
        progress: called with the number of tokens made so far.

    Raises:
        ValueError: if prompt and new tokens exceed the model's positions, or either is empty.
    """
    check_length(model.config, prompt_ids.shape[-1], max_new_tokens)
    reading = read(model, prompt_ids, chunk_size=max(1, prompt_ids.shape[-1]))
    new_ids, seconds = decode(model, reading, max_new_tokens, stop=stop_ids(model), progress=progress)
    return Generation(
        **asdict(cache_size(reading.cache)),
        text=decode_text(tokenizer, new_ids),
        prompt_tokens=prompt_ids.shape[-1],
        new_tokens=len(new_ids),
        prefill_seconds=reading.seconds,
        decode_tokens_per_second=tokens_per_second(new_ids, seconds),
    )


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of ids, special tokens left out."""
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool = False) -> Tensor:
    """Tokenise a prompt: [1, T] int64.

    Args:
        tokenizer: the model's.
        text: as it is, special tokens in it included.
        chat: put it into the tokenizer's chat template as a user's turn.

    Raises:
        ValueError: for an empty prompt, or a tokenizer without a chat template.
    """
    if chat:
        if not tokenizer.chat_template:
            raise ValueError("the model's tokenizer has no chat template; leave chat out")
        turns = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    # A template writes the special tokens itself.
    ids = tokenizer(text, add_special_tokens=not chat, verbose=False).input_ids
    if not text or not ids:
        raise ValueError("the prompt is empty")
    return torch.tensor([ids], dtype=torch.long)


def tokens_per_second(new_ids: list[int], seconds: float) -> float | None:
    """Speed of `decode`: its forward passes, one less than the new tokens, per second; None if there was none."""
    return (len(new_ids) - 1) / seconds if len(new_ids) > 1 else None


def cache_size(cache: Cache) -> CacheSize:
    """Measure a self-pruned cache, or one of transformers' own, which holds every pair."""
    if isinstance(cache, SPKVCache):
        return CacheSize(cache.density(), cache.kept_fraction(), cache.nbytes, cache.dense_nbytes)
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    held = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    return CacheSize(1.0, 1.0, held, held)


def stop_ids(model: PreTrainedModel) -> list[int]:
    """The ids that end a text, by the model's generation config."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def check_length(config: Any, tokens: int, new_tokens: int = 0) -> None:
    """Raise a ValueError if a text with its continuation exceeds the positions that a model was made for."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and tokens + new_tokens > positions:
        more = f" and {new_tokens:,} new ones are asked for" if new_tokens else ""
        raise ValueError(f"the text has {tokens:,} tokens{more}, but the model has {positions:,} positions")


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropy of logits [B, C, V] against targets [B, C or C - 1], in float32, block by block."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for start in range(0, targets.shape[1], _LOSS_POSITIONS):
        wanted = targets[:, start : start + _LOSS_POSITIONS]
        block = logits[:, start : start + wanted.shape[1]].float()
        total += F.cross_entropy(block.flatten(0, 1), wanted.flatten(), reduction="sum")
    return total


class _Clock:
    """Seconds between the starts and stops of some module's forward passes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def start(self, device: torch.device) -> None:
        self._started = _now(device)

    def stop(self, device: torch.device) -> None:
        self.seconds += _now(device) - self._started


@contextmanager
def _decoder_clock(model: PreTrainedModel) -> Iterator[_Clock]:
    clock, decoder, device = _Clock(), model.get_decoder(), model.device
    handles = (
        # In front of the attachment's own hook, whose work belongs to the pass.
        decoder.register_forward_pre_hook(lambda *_: clock.start(device), prepend=True),
        decoder.register_forward_hook(lambda *_: clock.stop(device)),
    )
    try:
        yield clock
    finally:
        for handle in handles:
            handle.remove()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
