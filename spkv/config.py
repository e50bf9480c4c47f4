"""What an attached model is: the sizes and the policy that its predictor was trained with."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_FILE = "spkv_config.json"
PREDICTOR_FILE = "predictor.safetensors"
FORMAT = 1  # of the files of a checkpoint
PAGE_DTYPES = ("int8", "fp8", "int4")
PageDtype = str | Sequence[str | None] | None


@dataclass(frozen=True)
class SPKVConfig:
    """Configuration of a self-pruned KV cache; immutable and checked when made.

    Attributes:
        window: number of latest positions, the query's own included, that are always visible (w >= 1).
        threshold: a pair is kept past the window where its utility is at least this; strictly in (0, 1).
        predictor_width: width of the predictor's hidden layer; None takes the model's hidden size.
        predictor_depth: its linear layers, with SiLU between; 1 makes the predictor linear.
        initial_bias: bias that the predictor's last layer starts from. The published +5 starts with open gates
            (sigmoid(5) = 0.993); short recipes start lower.
        layers: indices of the layers that get a predictor; None takes every global attention layer.
        page_size: pairs in a page of the cache.
        page_dtype: one of `PAGE_DTYPES` codes kept pairs when they leave the window (see `spkv.ops.codec`); None keeps
            them in the model's dtype; a sequence says it for each layer of the model.
        layout: a static layout in place of utilities and predictors: for each layer of the model, the KV heads that
            keep every pair; the others keep their window, and `sinks`. A layer that is local by design has none.
        sinks: positions at the start of a sequence that all heads keep (attention sinks), with a layout or, whatever
            the predictor makes of them, without.
    """

    window: int = 128
    threshold: float = 0.5
    predictor_width: int | None = None
    predictor_depth: int = 2
    initial_bias: float = 5.0
    layers: tuple[int, ...] | None = None
    page_size: int = 16
    page_dtype: PageDtype = None
    layout: tuple[tuple[int, ...], ...] | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        _check_positive_int("window", self.window)
        check_threshold(self.threshold)
        if self.predictor_width is not None:
            _check_positive_int("predictor_width", self.predictor_width)
        _check_positive_int("predictor_depth", self.predictor_depth)
        if isinstance(self.initial_bias, bool) or not isinstance(self.initial_bias, (int, float)):
            raise TypeError(f"initial_bias must be a number, not {self.initial_bias!r}")
        if self.layers is not None:
            layers = tuple(self.layers)
            if not layers or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in layers):
                raise ValueError(f"layers must be None or non-negative layer indices, not {self.layers!r}")
            object.__setattr__(self, "layers", tuple(sorted(set(layers))))
        _check_positive_int("page_size", self.page_size)
        object.__setattr__(self, "page_dtype", check_page_dtype(self.page_dtype))
        if self.layout is not None:
            object.__setattr__(self, "layout", _checked_layout(self.layout))
            if self.layers is not None:
                raise ValueError("a static layout has no predictors: layers and layout exclude each other")
        if isinstance(self.sinks, bool) or not isinstance(self.sinks, int) or self.sinks < 0:
            raise ValueError(f"sinks must be a whole number of at least 0, not {self.sinks!r}")

    def replace(self, **changes: Any) -> SPKVConfig:
        """Return a copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `from_dict` is the inverse."""
        values = dataclasses.asdict(self)
        values["layers"] = None if self.layers is None else list(self.layers)
        if isinstance(self.page_dtype, tuple):
            values["page_dtype"] = list(self.page_dtype)
        if self.layout is not None:
            values["layout"] = [list(heads) for heads in self.layout]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SPKVConfig:
        """Make a config from `to_dict`'s output.

        Raises:
            ValueError: for a field that does not exist, naming those that do.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown SPKVConfig fields {unknown}; known are {sorted(known)}")
        layers = values.get("layers")
        return cls(**{**values, "layers": None if layers is None else tuple(layers)})


def read_stored(path: Path) -> dict[str, Any]:
    """Read what a checkpoint's `spkv_config.json` says, its config and more, from the directory or the file itself.

    Raises:
        FileNotFoundError, ValueError: if there is none, or of a format that this version does not read.
    """
    file = path if path.name == CONFIG_FILE else path / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{os.fspath(path)!r} holds no {CONFIG_FILE}")
    stored = json.loads(file.read_text(encoding="utf-8"))
    if stored.get("format") != FORMAT:
        raise ValueError(f"{file} has format {stored.get('format')!r}; this version reads format {FORMAT}")
    return stored


def check_page_dtype(page_dtype: PageDtype) -> str | tuple[str | None, ...] | None:
    """Return `page_dtype`, None or one of `PAGE_DTYPES` or a sequence of them, else raise a ValueError."""
    one_each = page_dtype if isinstance(page_dtype, (list, tuple)) and page_dtype else [page_dtype]
    if any(own is not None and (not isinstance(own, str) or own not in PAGE_DTYPES) for own in one_each):
        raise ValueError(
            f"page_dtype must be None or one of {', '.join(PAGE_DTYPES)}, or a list of these, one for each layer; "
            f"not {page_dtype!r}"
        )
    return page_dtype if page_dtype is None or isinstance(page_dtype, str) else tuple(page_dtype)


def _checked_layout(layout: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    for heads in layout:
        if any(isinstance(head, bool) or not isinstance(head, int) or head < 0 for head in heads):
            raise ValueError(f"layout must list KV heads, counted from 0, for each layer, not {list(heads)!r}")
    return tuple(tuple(sorted(set(heads))) for heads in layout)


def check_threshold(threshold: float) -> float:
    """Return `threshold` if it lies strictly between 0 and 1, else raise a ValueError or TypeError."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold must be a number in (0, 1), not {threshold!r}")
    if not 0.0 < threshold < 1.0:
        raise ValueError(f"threshold must lie strictly between 0 and 1, not {threshold!r}")
    return float(threshold)


def _check_positive_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number of at least 1, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
