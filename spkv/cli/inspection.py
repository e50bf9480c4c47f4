"""The commands that look at what a model keeps: `spkv inspect` and `spkv hybrid`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spkv.cli.commands import Adapter, Device, Dtype, Json, Model, Threshold, app
from spkv.cli.console import emit, print_values, working
from spkv.cli.models import opened, tokenizer_and_config
from spkv.outputs import check_holds_no_model

if TYPE_CHECKING:
    from spkv.inspect import Inspection

Texts = Annotated[list[Path], typer.Option("--text", metavar="FILE...", help="Texts to read; repeatable.")]
Documents = Annotated[int, typer.Option(help="Documents of each file to read at most.")]
Tokens = Annotated[int | None, typer.Option(help="Tokens of a document to read at most; default: all.")]


@app.command()
def inspect(
    model: Model,
    text: Texts,
    output: Annotated[
        Path,
        typer.Option(metavar="DIR", help="For inspection.html, inspection.json and, with matplotlib, density.png."),
    ],
    adapter: Adapter = None,
    threshold: Threshold = None,
    documents: Documents = 1,
    tokens: Tokens = None,
    later_queries: Annotated[
        int, typer.Option(help="Later queries to find for every pair kept; 0 takes less time.")
    ] = 3,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Show what each layer, head and token keeps of some texts.

    Writes one page that needs no network, and its data as JSON.

    \b
    Example:
      spkv inspect smollm2 --text chapter.txt program.py --output inspection
    """
    with working() as progress:
        from spkv.inspect import write_inspection

        tokenizer, config = tokenizer_and_config(model)
        texts = _checked_texts(tokenizer, config, text, documents, tokens)
        with opened(model, adapter, device, dtype, threshold) as loaded:
            inspection = _inspect(loaded, tokenizer, texts, model, tokens, later_queries, progress)
        paths = write_inspection(inspection, output)
    keys = ("model", "threshold", "tokens", "window", "density", "kept_fraction")
    summary = inspection.summary()
    emit({key: summary[key] for key in keys} | {"documents": len(texts), **paths}, as_json, print_values)


@app.command()
def hybrid(
    model: Model,
    text: Texts,
    output: Annotated[Path, typer.Option(metavar="DIR", help="For the checkpoint and hybrid.json.")],
    global_heads: Annotated[int | None, typer.Option(help="KV heads that keep everything.")] = None,
    kv_budget: Annotated[
        float | None, typer.Option(help="Share of a dense cache to hold, windows included, in place of --global-heads.")
    ] = None,
    strategy: Annotated[
        str, typer.Option(help="densest-heads, densest-layers, interleave, random or learned.")
    ] = "densest-heads",
    sinks: Annotated[int, typer.Option(help="First tokens of a text that local heads keep, too.")] = 4,
    length: Annotated[
        int | None, typer.Option(help="Tokens at which the budget holds; default: the model's positions.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of strategy learned, each on a sequence of the texts.")] = 200,
    sequence_length: Annotated[int, typer.Option(help="Tokens of such a sequence.")] = 1024,
    seed: Annotated[int, typer.Option(help="Of strategies random and learned.")] = 0,
    adapter: Adapter = None,
    threshold: Threshold = None,
    documents: Documents = 1,
    tokens: Tokens = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Turn measured utilities into a static layout: global heads, and local ones that hold window and first tokens.

    Strategy learned trains a gate for each head and no weights: it looks for the heads that the model's predictions
    need, and takes the longest. Writes a checkpoint that needs no predictors. It has not been trained with this layout:
    `spkv adapt` does that.

    \b
    Example:
      spkv hybrid smollm2 --text chapter.txt --kv-budget 0.25 --output smollm2-hybrid
    """
    if (global_heads is None) == (kv_budget is None):
        raise ValueError("give one of --global-heads N and --kv-budget F")
    if sinks < 0:
        raise ValueError(f"--sinks must be at least 0, not {sinks}")
    check_holds_no_model(output)
    with working() as progress:
        from spkv.inspect import encode_pieces
        from spkv.inspect.hybrid import heads_in_budget, hybrid_layout, make_hybrid, write_hybrid
        from spkv.inspect.learned import LearningOptions, learn_heads

        tokenizer, config = tokenizer_and_config(model)
        at = config.max_position_embeddings if length is None else length
        texts = _checked_texts(tokenizer, config, text, documents, tokens)
        with opened(model, adapter, device, dtype, threshold) as loaded:
            inspection = _inspect(loaded, tokenizer, texts, model, tokens, 0, progress)
            if global_heads is None:
                assert kv_budget is not None
                global_heads = heads_in_budget(inspection, kv_budget, at, strategy, sinks)
            scores = None
            if strategy == "learned":
                scores = learn_heads(
                    loaded,
                    [encode_pieces(tokenizer, content, tokens)[0] for _, content in texts],
                    global_heads,
                    LearningOptions(steps, sequence_length=sequence_length, sinks=sinks, seed=seed),
                    progress=lambda done: progress("learning", done, steps),
                )
            layout = hybrid_layout(inspection, global_heads, strategy, sinks=sinks, seed=seed, scores=scores)
            make_hybrid(loaded, layout)
            report = write_hybrid(loaded, layout, inspection, output, length=at)
            tokenizer.save_pretrained(output)
    emit(report, as_json, print_values)


def _checked_texts(
    tokenizer: Any, config: Any, files: list[Path], documents: int, tokens: int | None
) -> list[tuple[str, str]]:
    """Names and texts; what is too long shows before the model is loaded."""
    from spkv.hf.generation import check_length
    from spkv.inspect import encode_pieces
    from spkv.text import read_some

    texts = read_some(files, documents)
    for _, content in texts:
        check_length(config, len(encode_pieces(tokenizer, content, tokens)[1]))
    return texts


def _inspect(
    loaded: Any,
    tokenizer: Any,
    texts: list[tuple[str, str]],
    model: str,
    tokens: int | None,
    later_queries: int,
    progress: Callable[[str, int, int], None],
) -> Inspection:
    from spkv.inspect import inspect_texts

    name = Path(model).absolute().name
    return inspect_texts(loaded, tokenizer, texts, name=name, limit=tokens, strongest=later_queries, progress=progress)
