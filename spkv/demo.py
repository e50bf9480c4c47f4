"""`spkv demo`: one real text, read and continued by a model as published and by its self-pruning form."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from spkv.checkpoint import load, load_base, resolve_adapter, resolve_model
from spkv.config import CONFIG_FILE
from spkv.hf.attach import attachment
from spkv.hf.generation import (
    Reading,
    cache_size,
    check_length,
    decode,
    decode_text,
    read,
    stop_ids,
    tokens_per_second,
)
from spkv.inspect.densities import decisions, encode_pieces, write_report
from spkv.text import read_document

TOKENS = 8000
NEW_TOKENS = 64
# Chapter 3 of the Python reference from its first section on, as Python itself carries it. The first of them alone
# has fewer than 8,000 tokens in some versions.
_DEFAULT_TOPICS = ("types", "specialnames")

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Side:
    """What was measured of one of the two models.

    Attributes:
        loss: mean next-token cross-entropy on the text, nats.
        density, kept_fraction, kv_bytes, dense_kv_bytes: as in `CacheSize`, at the end of the text.
        prefill_seconds: reading the text.
        decode_tokens_per_second: of the continuation; None for a single token.
        continuation: greedy.
    """

    loss: float | None
    density: float | None
    kept_fraction: float | None
    kv_bytes: int
    dense_kv_bytes: int
    prefill_seconds: float
    decode_tokens_per_second: float | None
    continuation: str


def demo(
    model: str | os.PathLike[str] = "smollm2",
    *,
    adapter: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    tokens: int = TOKENS,
    max_new_tokens: int = NEW_TOKENS,
    output: str | os.PathLike[str] = "spkv-demo",
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a base model with dense attention beside the same model with its adapter, and draw what was kept.

    Args:
        model: the base: "smollm2", a directory or a hub name.
        adapter: an adapter directory; None takes the one shipped for "smollm2".
        text: a file that `spkv.text` reads, its first document; None takes the Python reference.
        tokens: tokens of it to read; a shorter text is read to its end.
        max_new_tokens: tokens of each continuation.
        output: directory for pictures; made if needed.
        dtype: of weights and cache; None takes the checkpoint's. float32 suits CPUs: on two cores with AVX-512 a dense
            token at 8,000 took 0.16 s, against 0.39 s in bfloat16, and reading the text 32 s, against 28 s.
        device: None leaves everything on the CPU.
        progress: called as things go on.

    Returns:
        model, text, tokens, threshold, dense and spkv (the fields of `Side`), density_png, token_page and
        densities_json (paths).

    Raises:
        FileExistsError: if output is a file.
        FileNotFoundError, ValueError: if adapter or text is missing, or the sizes do not fit the model.
        ModuleNotFoundError: if matplotlib is missing, or the package that carries the model.
    """
    adapter = _find_adapter(model, adapter)
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError('the demo draws with matplotlib: pip install "spkv[plots]"', name="matplotlib")
    if Path(output).is_file():
        raise FileExistsError(f"output must be a directory, and {os.fspath(output)!r} is a file")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    source = "Python reference, data model" if text is None else Path(text).name
    content = _default_text() if text is None else read_document(text)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(model))
    input_ids, pieces = encode_pieces(tokenizer, content, tokens)
    check_length(AutoConfig.from_pretrained(resolve_model(model)), len(pieces), max_new_tokens)

    # One model at a time: two would double the memory.
    base = load_base(model, dtype=dtype).to(device or "cpu").eval()  # type: ignore[arg-type]
    dense_side, _ = _measure(base, tokenizer, input_ids, max_new_tokens, "dense", progress)
    del base
    pruned = load(model, adapter=adapter, dtype=dtype, device=device)
    spkv_side, reading = _measure(pruned, tokenizer, input_ids, max_new_tokens, "self-pruned", progress)

    found = attachment(pruned)
    name = Path(model).absolute().name
    paths = write_report(
        decisions(found, reading.utilities),
        pieces,
        output,
        title=f"{name} on {source}, threshold {found.threshold:g}",
        facts={"model": name, "text": source, "threshold": found.threshold},
    )
    return {
        "model": name,
        "text": source,
        "tokens": len(pieces),
        "threshold": found.threshold,
        "dense": asdict(dense_side),
        "spkv": asdict(spkv_side),
        **paths,
    }


def _find_adapter(model: str | os.PathLike[str], adapter: str | os.PathLike[str] | None) -> Path:
    """Look for the adapter before anything slow happens."""
    path = resolve_adapter(model, adapter)
    if path is None:
        raise ValueError(f"no adapter ships for {os.fspath(model)!r}: give one")
    if not (path / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"the adapter for {os.fspath(model)!r} is missing from this installation: {path} holds no {CONFIG_FILE}"
        )
    return path


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    max_new_tokens: int,
    label: str,
    progress: Progress | None,
) -> tuple[Side, Reading]:
    """Read and continue: a single pass over the text gives loss, cache, seconds and, if attached, the utilities."""

    def report(stage: str, total: int) -> Callable[[int], None] | None:
        return None if progress is None else lambda done: progress(f"{label}: {stage}", done, total)

    attached = label != "dense"
    reading = read(model, input_ids, loss=True, record=attached, progress=report("reading", input_ids.shape[1]))
    size = cache_size(reading.cache)
    # No stop at an end token: both sides are timed over as many tokens.
    new_ids, seconds = decode(model, reading, max_new_tokens, progress=report("continuing", max_new_tokens))
    ends = [index for index, token in enumerate(new_ids) if token in stop_ids(model)]
    side = Side(
        **asdict(size),
        loss=reading.loss,
        prefill_seconds=reading.seconds,
        decode_tokens_per_second=tokens_per_second(new_ids, seconds),
        continuation=decode_text(tokenizer, new_ids[: ends[0] if ends else None]),
    )
    return side, reading


def _default_text() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in _DEFAULT_TOPICS)
