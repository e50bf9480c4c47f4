"""`spkv eval`, and what is made of its results."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from spkv.cli.commands import Adapter, Device, Dtype, Json, Model, PageDtype, app
from spkv.cli.console import emit, print_evaluation, working
from spkv.cli.models import loader, opened, tokenizer_and_config
from spkv.config import SPKVConfig, check_page_dtype

# Enough for a score to the nearest few percent; losses take all the text that is given.
_EXAMPLES = 50


@app.command("eval")
def evaluate(
    model: Model,
    adapter: Adapter = None,
    task: Annotated[
        str, typer.Option(help="nll, the loss of a text, or tasks answered in words such as niah; with commas.")
    ] = "nll",
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE...", help="Text for nll: text or JSON lines, also .xz, .gz or .bz2; repeatable."),
    ] = None,
    sequence_length: Annotated[
        str, typer.Option(metavar="INTEGERS", help="Tokens of a sequence or an example, with commas.")
    ] = "4096",
    policies: Annotated[
        str,
        typer.Option(
            help="Rows of the result: dense, spkv, streaming, random; h2o, expected-attention, snapkv, tova, keydiff, "
            "each with +recent, +half and +heads if wanted; or NAME=PATH of another adapter or model."
        ),
    ] = "dense,spkv,streaming,random",
    thresholds: Annotated[
        str | None, typer.Option(help="Of policy spkv, with commas; default: the stored one.")
    ] = None,
    match_thresholds: Annotated[
        str | None, typer.Option(help="Those whose memory random, h2o and the like take; default: the stored one.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Model for dense, h2o and the like, such as a dense control; default: MODEL."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help=f"Examples of a task (default: {_EXAMPLES}), or sequences, spread over the data (all)."),
    ] = None,
    task_option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Of the tasks, such as depths=5; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the examples.")] = 0,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Save each example at once; the same command goes on there.")
    ] = None,
    oracle: Annotated[bool, typer.Option("--oracle", help="Compute nll with a mask instead of the cache.")] = False,
    batch_size: Annotated[int, typer.Option(help="Examples read at once, where their lengths allow.")] = 1,
    page_dtype: PageDtype = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure what pruning costs: losses of held-out text, and scores of tasks.

    A row for each task, length and policy. dense keeps every pair; spkv prunes at each threshold, or by the model's
    static layout; streaming keeps 4 sinks and the window; random has the density of spkv. h2o, expected-attention,
    snapkv, tova and keydiff run through kvpress (pip install "spkv[baselines]"): they prune a context once it is read,
    to the kept_fraction of spkv, and their loss is that of the 128 tokens after it. With +recent the last 128 tokens
    are among those kept, with +half the last tokens are half of those; with +heads the heads of a layer share what is
    kept by their scores (AdaKV). Sequences longer than the model's positions are read in windows.

    \b
    Example:
      spkv eval smollm2 --task nll --data valid.jsonl --sequence-length 4096 --thresholds 0.3,0.5,0.7
      spkv eval smollm2 --task niah --sequence-length 2048,4096 --limit 22 --output results
      spkv eval my-model-spkv --data valid.jsonl --policies dense,spkv,snapkv+heads,twin=my-twin --output results
    """
    with working() as progress:
        import spkv
        from spkv.evals import Losses, cut_sequences, layout_policies, make_policies
        from spkv.evals import evaluate as run_evaluation
        from spkv.evals.presses import check_press
        from spkv.text import prefix_ids

        check_page_dtype(page_dtype)
        tasks = _tasks(task.split(","), task_option or [])
        lengths = _integers("--sequence-length", sequence_length)
        matched = None if match_thresholds is None else _numbers("--match-thresholds", match_thresholds)
        given = None if thresholds is None else _numbers("--thresholds", thresholds)
        named: dict[str, Any] = {
            "names": policies.split(","),
            "thresholds": given or matched or [SPKVConfig().threshold],  # until the stored one is known
            "match_thresholds": matched,
            "reference": reference,
        }
        for policy in make_policies(**named):  # mistakes in them should show before the model is loaded
            if policy.press is not None:
                check_press(policy.press)
        if ("nll" in tasks) != bool(data):
            raise ValueError("task nll needs --data FILE..., and other tasks take none")
        tokenizer, config = tokenizer_and_config(model)
        jobs: list[Any] = []
        for length in lengths:
            for made in tasks.values():
                if made is None:
                    sequences = cut_sequences(data or [], tokenizer, length, limit=limit, progress=progress)
                    jobs.append(Losses(sequences, prefix_ids(tokenizer)))
                else:
                    jobs.append(_answers(made, tokenizer, config, length, limit or _EXAMPLES, seed))
        with opened(model, adapter, device, dtype, page_dtype=page_dtype) as loaded:
            found = spkv.attachment(loaded)
            if found.config.layout is None:
                if given is None:
                    named["thresholds"] = [found.config.threshold]
                chosen = make_policies(**named, stored_threshold=found.config.threshold)
            elif given is not None:
                raise ValueError("a static layout has no threshold: leave --thresholds out")
            else:
                chosen = layout_policies(named["names"], found.gate, found.layout_density())
            rows = run_evaluation(
                loaded,
                jobs,
                chosen,
                load=loader([model] if reference is None else [model, reference], device, dtype, page_dtype),
                batch_size=batch_size,
                oracle=oracle,
                output=output,
                arguments={
                    "model": model,
                    "adapter": None if adapter is None else str(adapter),
                    "dtype": str(loaded.dtype).removeprefix("torch."),
                    "device": loaded.device.type,
                    "page_dtype": page_dtype,
                },
                progress=progress,
            )
    emit(rows, as_json, print_evaluation)


@app.command()
def report(
    results: Annotated[
        list[Path], typer.Argument(metavar="DIR-OR-JSON...", help="What `spkv eval` wrote to --output, or printed.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="For report.html, the pictures and report.json.")],
    as_json: Json = False,
) -> None:
    """Draw the results of evaluations: a table and pictures on one page.

    Scores and losses against kept_fraction, losses by position, densities by length, and scores by depth where a task
    has depths. Results of several runs are merged; nothing is measured again.

    \b
    Example:
      spkv report results more-results --output pictures
    """
    from spkv.evals.report import write_report

    emit(write_report(results, output), as_json, lambda made: typer.echo(f"Written to {made['page']}"))


@app.command(
    "lm-eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="...",
)
def harness(context: typer.Context) -> None:
    """Run lm-evaluation-harness, which finds the model "spkv" there.

    Takes the options of its own command line; of the model's arguments, threshold, adapter, page_dtype, dense and
    oracle are ours.

    \b
    Example:
      spkv lm-eval run --model spkv --model_args pretrained=smollm2,threshold=0.5 --tasks arc_easy --batch_size 8
    """
    try:
        from spkv.evals.harness import main
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("spkv"):
            raise
        raise ModuleNotFoundError(
            f'spkv lm-eval needs lm-evaluation-harness ({error}): pip install "spkv[lm-eval]"', name=error.name
        ) from error
    main(context.args)


def _tasks(names: list[str], options: list[str]) -> dict[str, Any]:
    """The tasks called `names`, by name; None stands for nll."""
    in_words = [name for name in names if name != "nll"]
    if not in_words:
        if options:
            raise ValueError("--task-option is for tasks that are answered in words")
        return {"nll": None}
    from spkv.evals.tasks import TaskOptions, make_tasks

    fields = {field.name: field for field in dataclasses.fields(TaskOptions)}
    given: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or name not in fields:
            raise ValueError(f"--task-option takes NAME=VALUE with one of {', '.join(fields)}, not {option!r}")
        is_path = "Path" in str(fields[name].type)
        given[name] = Path(value) if is_path else int(value) if value.lstrip("-").isdigit() else value
    made = {task.name: task for task in make_tasks(in_words, TaskOptions(**given))}
    return {"nll": None, **made} if "nll" in names else made


def _answers(task: Any, tokenizer: Any, config: Any, length: int, count: int, seed: int) -> Any:
    from spkv.evals import Answers
    from spkv.hf.generation import check_length

    check_length(config, length)  # before examples are made that no model could read
    return Answers(task, tokenizer, length, count, seed)


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} takes numbers with commas between, such as 0.3,0.5, not {text!r}") from None


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} takes whole numbers with commas between, such as 2048,4096, not {text!r}") from None
