"""How numbers of evaluations are written, on the terminal and in reports. Needs nothing but the numbers."""

from __future__ import annotations

from typing import Any


def format_kept_fraction(value: float | None) -> str:
    """A kept_fraction with the factor that it saves: `0.21 (4.8×)`."""
    return "–" if value is None else f"{value:.2f} ({1 / value:.1f}×)"


def matched_in_context(row: dict[str, Any]) -> bool:
    """Whether a policy had to take the memory of another, as much of it as there is once the context is read."""
    same = row["context_kept_fraction"] in (None, row["kept_fraction"])
    return row["match_threshold"] is not None and not same


def policy_label(row: dict[str, Any]) -> str:
    """A row's policy, with what sets it apart from others of that name."""
    if row["threshold"] is not None:
        return f"{row['policy']} {row['threshold']:g}"
    return row["policy"] if row["match_threshold"] is None else f"{row['policy']} like {row['match_threshold']:g}"


def beside(name: str, row: dict[str, Any], dense: dict[str, Any] | None) -> str:
    """A measure with how it differs from the dense one, a score by points, a loss by a share; ± one standard error."""
    value = row[name]
    if value is None:
        return "–"
    plain = f"{value:.3f}" if name == "score" else f"{value:.4f}"
    other = None if dense is None or dense is row else dense[name]
    if other is None:
        return plain
    error = row["standard_error"].get(name)
    if name == "score":
        return f"{plain} ({value - other:+.3f}{'' if error is None else f'±{error:.3f}'})"
    return f"{plain} ({value / other - 1:+.2%}{'' if error is None else f'±{error / other:.2%}'})"
