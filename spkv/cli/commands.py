"""The commands. Everything heavy is imported by the one that runs, so that `--help` is quick."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from spkv.cli.console import (
    emit,
    print_demo,
    print_generation,
    print_values,
    quiet_stdout,
    working,
)
from spkv.cli.models import DTYPES, device_called, dtype_called, opened, tokenizer_and_config
from spkv.config import PAGE_DTYPES, check_page_dtype, check_threshold

# A library's TypeError is as likely a user's mistake as a fault of ours; this shows where it came from.
TRACEBACK = "SPKV_TRACEBACK"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # \b keeps the lines of an example apart
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="A KV cache that prunes itself, for any Hugging Face causal language model.",
    epilog=f"Set {TRACEBACK}=1 to see where an error came from.",
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help='A directory, a hub name, "smollm2" with its shipped adapter, or "gemma3-270m".'
    ),
]
Adapter = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Adapter made by `spkv adapt` with --lora-rank or fast-frozen.")
]
Threshold = Annotated[
    float | None, typer.Option(help="Keep pairs with at least this utility, in (0, 1); default: the stored one.")
]
Data = Annotated[
    list[Path], typer.Option("--data", metavar="FILE...", help="Text or JSON lines, also .xz, .gz or .bz2; repeatable.")
]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:1; default: a GPU if there is one.")]
Dtype = Annotated[
    str | None,
    typer.Option(help=f"Of weights and cache: {', '.join(DTYPES)}; default: the checkpoint's, on a CPU float32."),
]
PageDtype = Annotated[
    str | None,
    typer.Option(help=f"Code kept pairs as one of {', '.join(PAGE_DTYPES)}; default: the stored choice, or none."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from spkv import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def demo(
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: the Python reference.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of it to read.")] = 8000,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of each continuation.")] = 64,
    output: Annotated[Path, typer.Option(metavar="DIR", help="For the pictures.")] = Path("spkv-demo"),
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: the shipped one.")] = None,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda:1.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"Of weights and cache: {', '.join(DTYPES)}.")] = "float32",
    as_json: Json = False,
) -> None:
    """Compare dense and self-pruned SmolLM2 on a real text.

    The model as published reads and continues it, then the same model with its adapter. Takes some minutes on a CPU.

    \b
    Example:
      spkv demo --text my-notes.txt --output pictures
    """
    with working() as progress:
        from spkv.demo import demo as run_demo

        result = run_demo(
            adapter=adapter,
            text=text,
            tokens=tokens,
            max_new_tokens=max_new_tokens,
            output=output,
            dtype=dtype_called(dtype),
            device=device_called(device),
            progress=progress,
        )
    emit(result, as_json, print_demo)


@app.command()
def generate(
    model: Model,
    adapter: Adapter = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(metavar="FILE", help="A file that holds it.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put it in the model's chat template as a question.")] = False,
    threshold: Threshold = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="The model's own attention and cache; of the base, if it has no adapter.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to make at most.")] = 128,
    page_dtype: PageDtype = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt, and measure cache and speed.

    Greedy. With --dense, "smollm2" runs as published, and so does a plain model; a self-pruned model, or one given with
    --adapter, runs its adapted weights with all pairs.

    \b
    Example:
      spkv generate smollm2 --prompt "Once upon a time" --max-new-tokens 64
    """
    from spkv.text import read_document

    check_page_dtype(page_dtype)
    if threshold is not None:
        check_threshold(threshold)
    if dense and (threshold is not None or page_dtype is not None):
        raise ValueError("--dense keeps every pair as it is: it cannot be combined with --threshold or --page-dtype")
    if (prompt is None) == (prompt_file is None):
        raise ValueError("give the prompt with one of --prompt TEXT and --prompt-file FILE")
    content = read_document(prompt_file) if prompt_file is not None else prompt or ""
    if not content.strip():
        raise ValueError("the prompt is empty")
    with working() as progress:
        from spkv.hf.generation import check_length, encode_prompt
        from spkv.hf.generation import generate as run_generate

        tokenizer, config = tokenizer_and_config(model)
        prompt_ids = encode_prompt(tokenizer, content, chat=chat)
        check_length(config, prompt_ids.shape[1], max_new_tokens)
        with opened(model, adapter, device, dtype, threshold, dense, page_dtype) as loaded:
            result = run_generate(
                loaded,
                tokenizer,
                prompt_ids,
                max_new_tokens=max_new_tokens,
                progress=lambda done: progress("generating", done, max_new_tokens),
            ).to_dict()
    emit(result, as_json, partial(print_generation, label="dense" if dense else "self-pruned"))


@app.command()
def adapt(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(metavar="DIR", help="For the result, logs and checkpoints.")],
    recipe: Annotated[
        str,
        typer.Option(
            help="paper (long), fast (minutes), fast-lora (an adapter), fast-frozen (an adapter of predictors alone) "
            "or dense-control."
        ),
    ] = "fast",
    target_density: Annotated[
        float | None, typer.Option(help="Where the density should end, in (0, 1); default: the recipe's, 0.2 of fast.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Latest tokens that are always kept; default: the recipe's, 128.")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train LoRA of this rank and save an adapter; default: the recipe's.")
    ] = None,
    predictor_width: Annotated[
        int | None, typer.Option(help="Of the predictor's hidden layer; default: the model's hidden size.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens; default: the recipe's.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens of a row; default: the recipe's.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="The model's, at its peak; the predictor keeps its own.")
    ] = None,
    predictor_lr_multiplier: Annotated[
        float | None,
        typer.Option(
            help="The predictor's learning rate / the model's; default: such that the predictor's is the recipe's, "
            "25 times 3e-4 of fast."
        ),
    ] = None,
    standardised_inputs: Annotated[
        bool,
        typer.Option(
            "--standardised-inputs",
            help="Scale what predictors read to mean 0 and variance 1 while they learn: better for Gemma.",
        ),
    ] = False,
    validation: Annotated[
        list[Path] | None, typer.Option(metavar="FILE...", help="Held-out text to evaluate; repeatable.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows that a process computes at once.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    compile_parts: Annotated[
        bool, typer.Option("--compile", help="Fuse small operations with torch.compile: shorter steps, a later start.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")] = False,
    seed: Annotated[int, typer.Option(help="Of the predictor's start and the order of the data.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a model to prune its own cache.

    Under torchrun or accelerate launch it uses all their processes.

    \b
    Example:
      spkv adapt my-model --data books.jsonl.xz --output my-model-spkv --validation held-out.jsonl
      torchrun --nproc-per-node 8 -m spkv.cli adapt my-model --data books.jsonl.xz --output my-model-spkv
    """
    with quiet_stdout():
        from spkv.training import adapt as run_adapt
        from spkv.training import get_recipe

        tokenizer_and_config(model)  # what is no model should show at once, and as elsewhere
        given = {
            "target_density": target_density,
            "window": window,
            "lora_rank": lora_rank,
            "predictor_width": predictor_width,
            "tokens": tokens,
            "sequence_length": sequence_length,
            "learning_rate": learning_rate,
            "predictor_lr_multiplier": predictor_lr_multiplier,
            "standardised_inputs": standardised_inputs or None,
        }
        summary = run_adapt(
            model,
            data,
            output,
            get_recipe(recipe, **{name: value for name, value in given.items() if value is not None}),
            validation=validation,
            batch_size=batch_size,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile_parts,
            resume=resume,
            seed=seed,
        )
    if os.environ.get("RANK", "0") == "0":  # the other processes know no more
        emit(summary, as_json, print_values)
