"""The suite of the four operators: its groups of cases, each of which yields rows (`benchmarks.timing.FIELDS`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from benchmarks import ops_decode, ops_prefill, ops_train
from benchmarks.timing import Row, Session

CASES: dict[str, Callable[[Session], Iterator[Row]]] = {
    "train": ops_train.rows,
    "prefill": ops_prefill.rows,
    "decode": ops_decode.rows,
    "write": ops_decode.write_rows,
}


def rows(session: Session, cases: Sequence[str]) -> Iterator[Row]:
    """Run groups of cases in the order given."""
    for name in cases:
        yield from CASES[name](session)


def flashinfer_kernels(cases: Sequence[str], quick: bool) -> set[tuple[str, int, int, int]]:
    """The FlashInfer kernels that these cases run: name, heads, KV heads, head size."""
    kernels: set[tuple[str, int, int, int]] = set()
    if "prefill" in cases:
        kernels |= ops_prefill.flashinfer_kernels()
    if "decode" in cases:
        kernels |= ops_decode.flashinfer_kernels(quick)
    return kernels
