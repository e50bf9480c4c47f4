"""Evaluations, run: each task at each length under each policy."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from spkv import __version__
from spkv.evals.nll import Losses
from spkv.evals.policies import Load, Policy, check_matches, in_force
from spkv.evals.presses import check_press
from spkv.evals.records import Key, Records
from spkv.evals.rows import make_row, mean
from spkv.hf.generation import CHUNK_SIZE

_SAMPLED = 64

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


class Job(Protocol):
    """One task at one length: `Answers` or `Losses`."""

    name: str
    length: int
    count: int

    def identity(self) -> dict[str, Any]:
        """What a saved evaluation of the same examples must agree in."""

    def check(self, model: PreTrainedModel, press: str | None = None, *, oracle: bool = False) -> None:
        """Raise a ValueError if a model, or a method of `spkv.evals.presses`, cannot do it."""

    def batches(self, model: PreTrainedModel, batch_size: int) -> list[list[int]]:
        """Indices of the examples that are read together."""

    def run(
        self,
        model: PreTrainedModel,
        batch: Sequence[int],
        *,
        chunk_size: int,
        press: str | None = None,
        kept_fraction: float | None = None,
        oracle: bool = False,
    ) -> list[dict[str, Any]]:
        """Measure a batch under the gate in force: a record, JSON values, for each example."""


def evaluate(
    model: PreTrainedModel,
    jobs: Sequence[Job],
    policies: Sequence[Policy],
    *,
    load: Load | None = None,
    batch_size: int = 1,
    chunk_size: int = CHUNK_SIZE,
    oracle: bool = False,
    output: str | os.PathLike[str] | None = None,
    arguments: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Run every job under every policy.

    Args:
        model: the evaluated model, attached and in evaluation mode.
        jobs: `Answers` and `Losses`.
        policies: from `make_policies`, or one's own.
        load: loads the models that policies name; each when its turn comes.
        batch_size: examples read at once, where their lengths allow.
        chunk_size: tokens of a forward pass, of each example.
        oracle: compute with a mask instead of a cache; losses only.
        output: directory in which every finished example is saved at once. If it holds an evaluation that was
            interrupted, that one goes on.
        arguments: what an evaluation that goes on must agree in, besides what is given here.
        progress: called after each batch, with the tokens read and in all.

    Returns:
        Rows of `make_row`, for each job those of all policies, in their order.

    Raises:
        ValueError: for a job that a model or policy cannot do, or an `output` with another evaluation.
        ModuleNotFoundError: for a policy that needs a library that is not installed.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    check_matches(policies)
    labels = [policy.label for policy in policies]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"several policies are called {', '.join(twice)}: their results would be taken for one's")
    for policy in policies:
        if policy.press is not None:
            check_press(policy.press, model if policy.model is None else None)
        if policy.model is not None and load is None:
            raise ValueError(f"policy {policy.name} runs on {policy.model!r}, and no function was given that loads it")
        for job in jobs:
            job.check(model, policy.press, oracle=oracle)
    records = Records(output, {**(arguments or {}), **_arguments(jobs, policies, batch_size, chunk_size, oracle)})
    records.check_weights("the model", _checksum(model))
    total = sum(job.count * job.length for job in jobs) * len(policies)
    done = 0

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress is not None:
            progress("evaluating", done, total)

    name, other = None, None  # the one further model that is loaded
    # `spkv` on the evaluated model comes before those that take its memory, and every model has its turn once.
    for policy in sorted(policies, key=lambda p: (p.model is not None, p.model or "", p.match_threshold is not None)):
        if policy.model is not None and policy.model != name:
            assert load is not None
            name, other = policy.model, None  # the last one is let go before the next is loaded
            other = load(name)
            records.check_weights(name, _checksum(other))
        chosen = model if policy.model is None else other
        assert chosen is not None
        for job in jobs:
            if chosen is not model:
                job.check(chosen, policy.press, oracle=oracle)
                if policy.press is not None:
                    check_press(policy.press, chosen)
            _run(chosen, job, policy, records, batch_size, chunk_size, oracle, advance)
            records.write_results(_rows(jobs, policies, records))
    return _rows(jobs, policies, records)


def evaluate_nll(
    model: PreTrainedModel,
    sequences: Tensor,
    policies: Sequence[Policy],
    *,
    batch_size: int = 1,
    chunk_size: int = CHUNK_SIZE,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measure loss and density of the same sequences under each policy: `evaluate` with nothing but `Losses`."""
    return evaluate(
        model, [Losses(sequences)], policies, batch_size=batch_size, chunk_size=chunk_size, progress=progress
    )


def _run(
    model: PreTrainedModel,
    job: Job,
    policy: Policy,
    records: Records,
    batch_size: int,
    chunk_size: int,
    oracle: bool,
    advance: Callable[[int], None],
) -> None:
    """Measure what is not measured yet."""
    key: Key = (job.name, job.length, policy.label)
    matched = None
    if policy.match_threshold is not None:
        source = records.done((job.name, job.length, f"spkv {policy.match_threshold:g}"))
        which = "density" if policy.press is None else "context_kept_fraction"
        # Nothing has left the window of a short text; random gates have nothing to do then.
        matched = mean([source[index][which] for index in sorted(source)])
        matched = 1.0 if matched is None else matched
    for batch in job.batches(model, batch_size):
        # A batch is measured as a whole, so that going on rounds as an evaluation in one go does.
        if not all(index in records.done(key) for index in batch):
            started = time.perf_counter()
            with in_force(model, policy.gate_for(matched), policy.press):
                measured = job.run(
                    model, batch, chunk_size=chunk_size, press=policy.press, kept_fraction=matched, oracle=oracle
                )
            seconds = (time.perf_counter() - started) / len(batch)
            records.add(key, [{**record, "seconds": seconds} for record in measured])
        advance(job.length * len(batch))


def _rows(jobs: Sequence[Job], policies: Sequence[Policy], records: Records) -> list[dict[str, Any]]:
    rows = []
    for job in jobs:
        plain = records.done((job.name, job.length, "dense"))
        for policy in policies:
            done = records.done((job.name, job.length, policy.label))
            if len(done) == job.count:
                own = [done[index] for index in range(job.count)]
                dense = None
                if policy.name != "dense" and len(plain) == job.count:
                    dense = [plain[index] for index in range(job.count)]
                rows.append(make_row(job.name, job.length, policy, own, dense))
    return rows


def _arguments(
    jobs: Sequence[Job], policies: Sequence[Policy], batch_size: int, chunk_size: int, oracle: bool
) -> dict[str, Any]:
    examples = {
        f"{job.name} {job.length}": f"{job.count} with checksum {zlib.crc32(json.dumps(job.identity()).encode()):08x}"
        for job in jobs
    }
    return {
        "spkv": __version__,
        "examples": examples,
        "policies": [policy.label + (f" on {policy.model}" if policy.model else "") for policy in policies],
        "batch_size": batch_size,
        "chunk_size": chunk_size,
        "oracle": oracle,
    }


def _checksum(model: nn.Module) -> str | None:
    """A checksum of a model's weights: of some elements of each, evenly spread. None if some are offloaded."""
    checksum = 0
    for name, weight in model.named_parameters():
        if weight.is_meta:
            return None
        flat = weight.detach().flatten()
        sample = flat[:: max(1, -(-flat.numel() // _SAMPLED))].float().cpu()
        checksum = zlib.crc32(sample.numpy().tobytes(), zlib.crc32(name.encode(), checksum))
    return f"{checksum:08x}"
