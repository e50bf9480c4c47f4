"""Policies that evaluations compare: which pairs a model keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from spkv.config import CONFIG_FILE, check_threshold
from spkv.evals.presses import PRESSES, Press, is_press, room_for_press
from spkv.gates import Gate, RandomGate, SinkGate, ThresholdGate
from spkv.hf.attach import attachment, dense, find_attachment

POLICIES = ("dense", "spkv", "streaming", "random", *PRESSES)
DEFAULT_POLICIES = ("dense", "spkv", "streaming", "random")

Load = Callable[[str], PreTrainedModel]
"""Loads the model that a path or name stands for, in evaluation mode."""


@dataclass(frozen=True)
class Policy:
    """One row of an evaluation. For a policy of one's own, give a name and any hard gate.

    Attributes:
        name: what the row is called.
        gate: what decides; None runs the model's own dense attention and cache.
        threshold: for the row; None where there is none.
        match_threshold: the threshold of `spkv` whose memory the policy takes: its density for a random gate, its
            kept_fraction for a press.
        press: a method of `spkv.evals.presses` with its settings, which prunes once, when the context has been read.
        model: path or name of the model that it runs on, if that is not the evaluated one.
    """

    name: str
    gate: Gate | None = None
    threshold: float | None = None
    match_threshold: float | None = None
    press: str | None = None
    model: str | None = None

    @property
    def label(self) -> str:
        """Its name with what sets it apart from others of that name."""
        if self.threshold is not None:
            return f"{self.name} {self.threshold:g}"
        return self.name if self.match_threshold is None else f"{self.name} like {self.match_threshold:g}"

    def gate_for(self, density: float | None) -> Gate | None:
        """The gate to put in force, given the density to match."""
        if self.match_threshold is None or self.press is not None:
            return self.gate
        assert density is not None
        return RandomGate(density)


def layout_policies(names: Sequence[str], gate: Gate, density: float) -> list[Policy]:
    """Make the policies called `names` for a model with a static layout: `spkv` is the layout, at no threshold.

    Args:
        names: dense, spkv, streaming, random.
        gate: the layout's.
        density: its share of heads that keep everything, which `random` takes.

    Raises:
        ValueError: for another name.
    """
    made = {
        "dense": Policy("dense"),
        "spkv": Policy("spkv", gate),
        "streaming": Policy("streaming", SinkGate()),
        "random": Policy("random", RandomGate(density)),
    }
    if unknown := [name for name in names if name not in made]:
        raise ValueError(f"a model with a static layout has the policies {', '.join(made)}, not {unknown}")
    return [made[name] for name in dict.fromkeys(names)]


def make_policies(
    names: Sequence[str] = DEFAULT_POLICIES,
    thresholds: Sequence[float] = (0.5,),
    *,
    stored_threshold: float = 0.5,
    match_thresholds: Sequence[float] | None = None,
    reference: str | None = None,
) -> list[Policy]:
    """Make the policies called `names`: `spkv` at each threshold, others once, or once for each matched threshold.

    Args:
        names: out of `POLICIES`; a press may be followed by settings, such as `h2o+half+heads`. Or `NAME=PATH` for
            another self-pruned model or adapter, at each threshold, or another plain model, which runs dense.
        thresholds: of `spkv`, each in (0, 1).
        stored_threshold: the model's own.
        match_thresholds: whose memory `random` and the presses take, out of `thresholds`; None takes the stored
            threshold if it is one of them, else the middle one.
        reference: path or name of the model that `dense` and the presses run on; None is the evaluated model with
            all pairs.

    Raises:
        FileNotFoundError: for a PATH that does not exist.
        ValueError: for an unknown name, a threshold outside (0, 1), or policies that match `spkv` without it.
    """
    names = [Press.of(name).name if is_press(name) else name for name in names]
    names, thresholds = list(dict.fromkeys(names)), list(dict.fromkeys(thresholds))
    others = dict(name.split("=", 1) for name in names if "=" in name)
    presses = [name for name in names if is_press(name)]
    unknown = [name for name in names if name not in (*POLICIES, *presses) and "=" not in name]
    if unknown or not names:
        raise ValueError(f"unknown policies {unknown}; known are {', '.join(POLICIES)}, or NAME=PATH")
    taken = [name for name in others if name in POLICIES or is_press(name) or not name]
    if taken or len(others) != sum("=" in name for name in names):
        raise ValueError(f"NAME=PATH needs a name of its own, not one of {', '.join(POLICIES)}, and each once")
    for threshold in thresholds:
        check_threshold(threshold)
    if "spkv" in names and not thresholds:
        raise ValueError("policy spkv needs at least one threshold")
    matching = [name for name in names if name == "random" or name in presses]
    if matching and "spkv" not in names:
        measure = "density" if matching == ["random"] else "memory"
        raise ValueError(f"policy {matching[0]} takes its {measure} from policy spkv, which is not among the policies")
    if match_thresholds is None:
        middle = sorted(thresholds)[(len(thresholds) - 1) // 2] if thresholds else None
        matched = [stored_threshold if stored_threshold in thresholds else middle]
    else:
        matched = list(dict.fromkeys(match_thresholds))
        if strange := [threshold for threshold in matched if threshold not in thresholds]:
            raise ValueError(f"thresholds {strange} cannot be matched: spkv is evaluated at {thresholds}")
    made = {
        "dense": [Policy("dense", model=reference)],
        "spkv": [Policy("spkv", ThresholdGate(t), threshold=t) for t in thresholds],
        "streaming": [Policy("streaming", SinkGate())],
        "random": [Policy("random", match_threshold=t) for t in matched],
        **{name: [Policy(name, match_threshold=t, press=name, model=reference) for t in matched] for name in presses},
    }
    for name, path in others.items():
        made[f"{name}={path}"] = _of_another_model(name, path, thresholds)
    return [policy for name in names for policy in made[name]]


@contextlib.contextmanager
def in_force(model: PreTrainedModel, gate: Gate | None, press: str | None = None) -> Iterator[None]:
    """Run a model under a gate, or densely if it is None, or as what a press keeps needs it."""
    if press is not None:
        with room_for_press(press, model):
            yield
    elif gate is not None:
        with attachment(model).using(gate):
            yield
    elif find_attachment(model) is not None:
        with dense(model):
            yield
    else:
        yield


def check_matches(policies: Sequence[Policy]) -> None:
    """Raise a ValueError if a policy matches a threshold at which `spkv` is not evaluated."""
    evaluated = sorted(p.threshold for p in policies if p.name == "spkv" and p.threshold is not None)
    for policy in policies:
        if policy.match_threshold is not None and policy.match_threshold not in evaluated:
            raise ValueError(
                f"policy {policy.name} takes the memory of spkv at threshold {policy.match_threshold}, "
                f"which is not evaluated; evaluated are {evaluated}"
            )


def matched_value(values: Mapping[float, float], policy: Policy) -> float | None:
    """What was measured of `spkv` at the threshold that a policy matches; None for one that matches nothing."""
    return None if policy.match_threshold is None else values[policy.match_threshold]


def _of_another_model(name: str, path: str, thresholds: Sequence[float]) -> list[Policy]:
    if not Path(path).is_dir():
        raise FileNotFoundError(f"policy {name} needs a model or an adapter, and there is no directory {path!r}")
    if not (Path(path) / CONFIG_FILE).is_file():
        return [Policy(name, model=path)]
    return [Policy(name, ThresholdGate(t), threshold=t, model=path) for t in thresholds]
