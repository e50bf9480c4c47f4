"""How an adapter tells its base model from others: by sizes, and by the mean magnitudes of some weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
# Relative difference of mean magnitudes above which two bases are not the same model. Storing normal float32 weights in
# bfloat16 moves that of a 32 x 32 matrix by up to 1.7e-4, and of a 576 x 576 one by 1.2e-5; merging SmolLM2's shipped
# LoRA moves those of the layers that are compared by 5e-4 to 1.3e-3.
_SAME_WEIGHTS = 3e-4


def sizes(config: Any) -> dict[str, Any]:
    """What a model's config says of them."""
    return {name: getattr(config, name) for name in ("model_type", *SIZES)}


def check_sizes(expected: dict[str, Any] | None, config: Any, adapter: Path) -> None:
    """Raise a ValueError that names what differs if `config` is not of the base that `expected` describes."""
    if expected is None:
        raise ValueError(f"{adapter} holds a whole model, not an adapter: load it by itself")
    actual = sizes(config)
    different = [name for name in actual if expected.get(name) != actual[name]]
    if different:
        given = ", ".join(f"{name}={actual[name]!r}" for name in different)
        wanted = ", ".join(f"{name}={expected.get(name)!r}" for name in different)
        raise ValueError(f"the adapter in {adapter} is for another model: it needs {wanted}, this one has {given}")


def deviation(expected: dict[str, Any], actual: dict[str, Any]) -> float:
    """The largest relative difference of two bases' mean magnitudes; infinite if sizes or names differ."""
    there, here = expected["mean_magnitudes"], actual["mean_magnitudes"]
    if there.keys() != here.keys() or any(expected.get(name) != actual[name] for name in ("model_type", *SIZES)):
        return math.inf
    return max((abs(here[name] / there[name] - 1) for name in there if there[name]), default=0.0)


def check_magnitude(expected: dict[str, Any], name: str, found: float | None, adapter: Path) -> None:
    """Raise a ValueError if a weight that `expected` names is missing, or has another mean magnitude.

    Args:
        expected: as for `check_sizes`.
        name: of the weight, as the decoder has it.
        found: its mean magnitude; None if there is no such weight.
        adapter: for the message.
    """
    value = expected["mean_magnitudes"][name]
    if found is None or abs(found - value) > _SAME_WEIGHTS * abs(value):
        raise ValueError(
            f"the adapter in {adapter} is for another model of the same sizes: the mean magnitude of {name} is "
            f"{found}, and was {value} in the base it was trained on"
        )
