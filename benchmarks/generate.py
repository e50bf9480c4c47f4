"""The suite `generate`: prefill and decode steps of whole models, self-pruned and dense, on one GPU.

The 8B shape is Llama-3.1-8B with random weights, whose predictors are set so that each head keeps a given share;
`smollm2` is SmolLM2-135M-Instruct with the shipped adapter on real text. A step is the median over blocks of replays
in the loop that `model.generate()` runs; prefill, capture and compilation are not in it. Before anything is timed, the
tokens of the graph are compared with those of transformers' own loop.

The dense baseline is the same model, its decode step captured by hand in a CUDA graph, with its small operations
compiled alike, around cuDNN's attention over exactly `length` pairs, growing by none: no dense cache in transformers
can be faster. Mode `concurrent` also gives it our projections side by side, and is what ours is compared with. Its
prefill is transformers' own with SDPA. The limit of a step is the bytes of weights and of held
pairs at the rate of a copy. Rows marked `iso_memory` hold as many sequences as fit beside the weights, and compare
tokens a second.

Legend: B sequences, L tokens that they hold.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import math
import pydoc_data.topics
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
)

import spkv
from benchmarks.ops_decode import head_densities
from benchmarks.timing import measure_limits
from spkv.checkpoint import resolve_model
from spkv.hf.compiled import compiled_parts
from spkv.hf.concurrent import concurrent_projections
from spkv.hf.families import find_decoder
from spkv.hf.graph import DecodeLoop

Row = dict[str, Any]

SHAPE_8B = LlamaConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=262_144, rope_theta=500_000.0,
)  # fmt: skip
QUICK_SHAPE = LlamaConfig(
    vocab_size=8192, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=262_144,
)  # fmt: skip
LENGTHS = (8192, 32_768, 131_072)
_SKEWED = -1.0  # stands for the skewed densities of `ops_decode`
DENSITIES = (0.25, _SKEWED, 0.10, 0.34)
_CODED = ("int8", "fp8", "int4")  # beside bfloat16, at the first density and at lengths where the cache matters
_MODES = ("compiled", "graph", "eager")  # the first at all densities, the others at the first one
_FEW_AND_MANY = (3, 19)  # tokens of an eager measurement
_STEPS = 162  # of a graph, ten blocks between captures
_CHECKED = 24  # tokens compared between the graph and transformers' loop
_PREFILL = 16_384
_SPARE = 4 * 2**30  # bytes left for activations
_SMOLLM2, _SMOLLM2_LENGTH = "SmolLM2-135M", 7168


def run(options: argparse.Namespace, result: dict[str, Any], save: Callable[[], None]) -> None:
    """Fill `result` with limits and rows, saving after each."""
    rows: list[Row] = result.setdefault("rows", [])
    limits = measure_limits(options.quick)
    result["limits"] = {"copy_gb_per_s": limits.copy_gb_per_s, "matmul_tflop_per_s": limits.matmul_tflop_per_s}
    start = time.monotonic()
    torch.cuda.empty_cache()
    smollm2 = () if options.quick else _smollm2(limits.copy_gb_per_s)
    for row in itertools.chain(smollm2, _random(options, limits.copy_gb_per_s)):
        rows.append(row)
        print(line(row), file=sys.stderr, flush=True)
        save()
        if time.monotonic() - start > options.time_limit:
            break


def line(row: Row) -> str:
    """A row as text."""
    name = f"{row['model']} {row['phase']} {row['batch']} x {row['length']}"
    columns = ("density", "milliseconds_per_step", "percent_of_limit", "versus_dense", "allocated_over_held")
    numbers = [f"{row[key]:.3f}" for key in columns if row.get(key) is not None]
    marks = ("*" if row["skewed"] else " ") + ("=" if row["iso_memory"] else " ")
    return f"{name:40} {row['implementation']:6} {row['mode']:8} {marks} " + " ".join(numbers)


def _random(options: argparse.Namespace, copy_rate: float) -> Iterator[Row]:
    """The 8B shape with random weights and every density."""
    quick = options.quick
    model = _random_model(QUICK_SHAPE if quick else SHAPE_8B)
    name = "quick shape" if quick else "Llama-3.1-8B shape"
    lengths = (2048,) if quick else options.lengths
    iso_length = 2048 if quick else 32_768
    # What is left beside the weights, of which the predictors' are to come, and room for activations.
    predictors = 2 * model.config.num_hidden_layers * model.config.hidden_size**2
    budget = 2**30 if quick else torch.cuda.mem_get_info()[0] - predictors - _SPARE
    iso_batch = budget // _dense_bytes(model, iso_length)
    steps, reads = {}, {}
    for length in lengths:
        for batch in (1, 8, 16, *([iso_batch] if length == iso_length else [])):
            for row in _dense_rows(model, name, batch, length, copy_rate):
                steps[batch, length] = min(row["milliseconds_per_step"], steps.get((batch, length), math.inf))
                yield row | {"iso_memory": batch == iso_batch}
        if (seconds := _dense_prefill(model, length)) is not None:
            reads[length] = 1e3 * seconds
            kv_bytes = _dense_bytes(model, length)
            yield _row(name, "dense", "eager", "prefill", 1, length, 1.0, reads[length], kv_bytes=kv_bytes)
    spkv.attach(model, spkv.SPKVConfig())
    for density in DENSITIES if quick else options.densities:
        skewed = density == _SKEWED
        _set_density(model, density)
        for length in lengths:
            ids = torch.randint(1, model.config.vocab_size, (1, length), device=model.device)
            iso = budget if length == iso_length and density == DENSITIES[0] else None
            codings = (None, *_CODED) if density == DENSITIES[0] and length >= iso_length else (None,)
            modes = _MODES if density == DENSITIES[0] else _MODES[:1]
            for row in (row for coding in codings for row in _spkv(model, name, ids, copy_rate, iso, coding, modes)):
                dense = reads.get(length) if row["phase"] == "prefill" else steps.get((row["batch"], length))
                if row["iso_memory"]:
                    dense_rate = iso_batch / steps[iso_batch, length]
                    row["versus_dense"] = row["batch"] / row["milliseconds_per_step"] / dense_rate
                elif dense:
                    row["versus_dense"] = dense / row["milliseconds_per_step"]
                yield row | {"skewed": skewed}


def _smollm2(copy_rate: float) -> Iterator[Row]:
    """SmolLM2 with its adapter on real text; nothing where its weights are not installed."""
    try:
        model = spkv.load("smollm2", dtype=torch.bfloat16, device="cuda")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        print(f"no SmolLM2: {error}", file=sys.stderr)
        return
    ids = torch.tensor([_read_topics()[:_SMOLLM2_LENGTH]], device="cuda")
    steps = {}
    with spkv.dense(model):
        for batch in (1, 8, 16):
            for row in _dense_rows(model, _SMOLLM2, batch, _SMOLLM2_LENGTH, copy_rate):
                steps[batch] = min(row["milliseconds_per_step"], steps.get(batch, math.inf))
                yield row
        read = 1e3 * _dense_prefill(model, _SMOLLM2_LENGTH)
        yield _row(_SMOLLM2, "dense", "eager", "prefill", 1, _SMOLLM2_LENGTH, 1.0, read)
    for row in _spkv(model, _SMOLLM2, ids, copy_rate):
        dense = read if row["phase"] == "prefill" else steps[row["batch"]]
        yield row | {"versus_dense": dense / row["milliseconds_per_step"]}


def _read_topics() -> list[int]:
    """Token ids of the Python manual that every interpreter carries."""
    text = "\n\n".join(pydoc_data.topics.topics.values())
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2"))
    return tokenizer(text[: 8 * _SMOLLM2_LENGTH]).input_ids


def _spkv(
    model: PreTrainedModel,
    name: str,
    ids: Tensor,
    copy_rate: float,
    iso_budget: int | None = None,
    page_dtype: str | None = None,
    modes: Sequence[str] = _MODES,
) -> Iterator[Row]:
    """Prefill of one sequence, and decode steps of as many copies of it as fit; one row fills `iso_budget` bytes."""
    length = ids.shape[1]
    cache = spkv.attachment(model).new_cache(page_dtype=page_dtype)
    _read(model, cache, ids[:, : 2 * _PREFILL])  # compiles, for a first chunk and for one after it
    cache.reset()
    seconds = _seconds(lambda: _read(model, cache, ids))
    held = cache.nbytes
    row = _row(name, "spkv", "eager", "prefill", 1, length, cache.density(), 1e3 * seconds, kv_bytes=held)
    coding = {} if page_dtype is None else {"page_dtype": page_dtype}
    yield row | _memory(cache) | coding
    batches = [1, 8, 16] if iso_budget is None else [1, 8, 16, int(iso_budget / (held * 1.02))]
    for batch in batches:
        if torch.cuda.mem_get_info()[0] + _unused() + cache.nbytes < held * batch * 1.02 + _SPARE // 2:
            break
        if batch > 1:
            cache.batch_select_indices(torch.arange(batch).clamp_max(cache.packed.sequences - 1))
        tokens = torch.cat([ids, ids.new_ones(1, cache.get_seq_length() + 1 - length)], 1).expand(batch, -1)
        if batch == 1:
            _check(model, tokens, cache)
            tokens = torch.cat([tokens, tokens.new_ones(1, _CHECKED)], 1)
        for mode in modes:
            if mode != "compiled" and (batch != 8 or length > 32_768 or page_dtype is not None):
                continue
            step, tokens = (_eager_step if mode == "eager" else _graph_step)(model, tokens, cache, mode)
            row = _row(name, "spkv", mode, "decode", batch, length, cache.density(), step, kv_bytes=cache.nbytes)
            row["iso_memory"] = batch not in (1, 8, 16)
            yield _with_limit(row, model, _held_bytes(cache), copy_rate) | _memory(cache) | coding
    cache.reset()
    _free()


def _check(model: PreTrainedModel, tokens: Tensor, cache: Any) -> None:
    """The graph must give the tokens of transformers' own loop; the cache moves on by them."""
    state, columns = cache.packed.state(), cache.get_seq_length()
    graphed = _generate(model, tokens, cache, _CHECKED, "graph")
    cache.packed.load_state(state)
    cache.advance(columns - cache.get_seq_length())
    eager = _generate(model, tokens, cache, _CHECKED, "eager")
    if not torch.equal(graphed, eager):
        raise RuntimeError("the graph does not give the tokens of transformers' loop")


def _generate(model: PreTrainedModel, tokens: Tensor, cache: Any, new: int, mode: str) -> Tensor:
    options = dict(do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0)
    graph = dict(cuda_graph=mode != "eager", compile=mode == "compiled")
    return model.generate(tokens, past_key_values=cache, **graph, **options)


def _eager_step(model: PreTrainedModel, tokens: Tensor, cache: Any, mode: str) -> tuple[float, Tensor]:
    """Milliseconds of a step of transformers' own loop: many tokens less few, divided by their number."""
    times = []
    for new in _FEW_AND_MANY:
        torch.cuda.synchronize()
        before = time.perf_counter()
        tokens = _generate(model, tokens, cache, new, mode)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    return 1e3 * (times[1] - times[0]) / (_FEW_AND_MANY[1] - _FEW_AND_MANY[0]), tokens


@torch.no_grad()
def _graph_step(model: PreTrainedModel, tokens: Tensor, cache: Any, mode: str) -> tuple[float, Tensor]:
    """Milliseconds of a step of `generate()`'s loop: the median over blocks of replays, by the GPU's clock."""
    logits = model(input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    marks: list[tuple[int, torch.cuda.Event]] = []

    def mark(made: int) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        marks.append((made, event))

    loop = DecodeLoop(model, cache, max_new_tokens=_STEPS, compile=mode == "compiled")
    new = loop.run(logits, mark)
    torch.cuda.synchronize()
    steps = [a.elapsed_time(b) / (n - m) for (m, a), (n, b) in itertools.pairwise(marks)]
    return statistics.median(steps), torch.cat([tokens, new], 1)


def _read(model: PreTrainedModel, cache: Any, ids: Tensor) -> None:
    with torch.no_grad():
        for start in range(0, ids.shape[1], _PREFILL):
            chunk = ids[:, start : start + _PREFILL]
            model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _random_model(config: LlamaConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def _set_density(model: PreTrainedModel, density: float) -> None:
    """Shift each predictor's bias so that every head keeps its share of random text."""
    attachment = spkv.attachment(model)
    ids = torch.randint(1, model.config.vocab_size, (1, 8192), device=model.device)
    with torch.no_grad(), attachment.record() as record:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        heads = head_densities(max(density, 0.0), density == _SKEWED, model.config.num_key_value_heads)
        for layer, predictor in attachment.predictors.items():
            logits = record.utilities[layer][0].double().logit()  # [Hkv, T]
            shift = [torch.quantile(row, 1 - share) for row, share in zip(logits, heads, strict=True)]
            predictor.down.bias -= torch.stack(shift).to(predictor.down.bias.dtype)


def _weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a step reads: all but the embedding, of which it reads a row a sequence."""
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    return sum(p.numel() * p.element_size() for p in model.parameters() if tied or p is not embedding)


def _dense_bytes(model: PreTrainedModel, pairs: int) -> int:
    decoder = find_decoder(model)
    return 2 * 2 * len(decoder.attentions) * decoder.kv_heads * decoder.head_size * pairs


class _FullCache:
    """Keys and values of every layer, [B, Hkv, L, D], for the hand-made dense step: the last place is overwritten."""

    def __init__(self, model: PreTrainedModel, batch: int, length: int) -> None:
        decoder = find_decoder(model)
        shape = (2, batch, decoder.kv_heads, length, decoder.head_size)
        self.layers = [torch.empty(shape, dtype=model.dtype, device=model.device).normal_() for _ in decoder.attentions]

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
    ) -> tuple[Tensor, None]:
        keys, values = self.layers[module.layer_idx]
        keys[:, :, -1:], values[:, :, -1:] = key, value
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        return out.transpose(1, 2), None


def _dense_rows(model: PreTrainedModel, name: str, batch: int, length: int, copy_rate: float) -> Iterator[Row]:
    """The dense step, and the same with projections side by side as ours has them; none if the cache does not fit."""
    for mode in ("compiled", "concurrent"):
        step = _dense_step(model, batch, length, concurrent_projections if mode == "concurrent" else None)
        if step is not None:
            kv_bytes = _dense_bytes(model, batch * length)
            row = _row(name, "dense", mode, "decode", batch, length, 1.0, step, kv_bytes=kv_bytes)
            yield _with_limit(row, model, kv_bytes, copy_rate)


@torch.no_grad()
def _dense_step(
    model: PreTrainedModel,
    batch: int,
    length: int,
    around: Callable[[PreTrainedModel], contextlib.AbstractContextManager[None]] | None,
) -> float | None:
    """Milliseconds of a dense decode step in a CUDA graph; None if the cache does not fit."""
    if _dense_bytes(model, batch * length) + _SPARE // 2 > torch.cuda.mem_get_info()[0] + _unused():
        return None
    cache = _FullCache(model, batch, length)
    AttentionInterface.register("benchmark_dense", cache.attend)
    AttentionMaskInterface.register("benchmark_dense", lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.set_attn_implementation("benchmark_dense")
    token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    position = torch.full((batch, 1), length - 1, device=model.device)

    def step() -> None:
        logits = model(input_ids=token, position_ids=position, use_cache=False, logits_to_keep=1).logits
        token.copy_(logits[:, -1].float().argmax(-1, keepdim=True))

    try:
        graph = torch.cuda.CUDAGraph()
        with compiled_parts(model), around(model) if around else contextlib.nullcontext():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()
                step()
            side.synchronize()
            with torch.cuda.graph(graph):
                step()
        graph.replay()
        steps = 32
        seconds = _seconds(lambda: [graph.replay() for _ in range(steps)])  # noqa: F821 (deleted below)
        del graph
    finally:
        model.set_attn_implementation(before)
        AttentionInterface.register("benchmark_dense", lambda *args, **kwargs: None)
        del cache
        _free()
    return 1e3 * seconds / steps


@torch.no_grad()
def _dense_prefill(model: PreTrainedModel, length: int) -> float | None:
    """Seconds of transformers' own prefill of one sequence; None if memory does not suffice."""
    ids = torch.randint(1, model.config.vocab_size, (1, length), device=model.device)

    def read() -> None:
        model(input_ids=ids, use_cache=True, logits_to_keep=1)

    try:
        model(input_ids=ids[:, :_PREFILL], use_cache=True, logits_to_keep=1)
        return _seconds(read)
    except torch.OutOfMemoryError:
        return None
    finally:
        _free()


def _seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _memory(cache: Any) -> Row:
    """How close what is allocated comes to the pairs held."""
    return {
        "allocated_over_held": cache.nbytes / _held_bytes(cache),
        "kept_fraction": cache.kept_fraction(),
        "times_smaller": cache.dense_nbytes / cache.nbytes,
    }


def _held_bytes(cache: Any) -> float:
    """Bytes of the pairs held, as they are stored."""
    packed = cache.packed
    in_window = int(packed.seen.clamp_max(packed.window).sum()) * packed.kv_heads
    kept = packed.kept_pairs().sum((1, 2)).tolist()  # by layer
    pages = [packed.pools[name].page_bytes / packed.page_size for name in packed.page_dtypes]
    return in_window * packed.pair_bytes + sum(n * size for n, size in zip(kept, pages, strict=True))


def _row(
    model: str,
    implementation: str,
    mode: str,
    phase: str,
    batch: int,
    length: int,
    density: float | None,
    milliseconds: float,
    kv_bytes: int | None = None,
) -> Row:
    tokens = batch * (length if phase == "prefill" else 1)
    return {
        "model": model,
        "implementation": implementation,
        "phase": phase,
        "batch": batch,
        "length": length,
        "density": density,
        "skewed": False,
        "page_dtype": "bfloat16",
        "mode": mode,
        "milliseconds_per_step": milliseconds,
        "tokens_per_second": 1e3 * tokens / milliseconds,
        "percent_of_limit": None,
        "versus_dense": 1.0 if implementation == "dense" else None,
        "kv_bytes": kv_bytes,
        "iso_memory": False,
    }


def _with_limit(row: Row, model: PreTrainedModel, held_bytes: float, copy_rate: float) -> Row:
    """The row with its share of what weights and held pairs allow."""
    limit = (_weight_bytes(model) + held_bytes) / copy_rate / 1e6
    return row | {"percent_of_limit": 100 * limit / row["milliseconds_per_step"]}


def _unused() -> int:
    return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
