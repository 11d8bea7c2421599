"""How the generated pages write tables and numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

OURS = "cwdpo_kernels"  # the name of our implementation in the result files


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def seconds(value: float) -> str:
    """Two significant digits down to a millisecond, without an exponent."""
    decimals = next((d for d, least in ((0, 10), (1, 1), (2, 0.1), (3, 0.01)) if value >= least), 4)
    return f"{value:.{decimals}f}"


def mib(value: float) -> str:
    return f"{max(value, 0.0):.{0 if value >= 10 else 1}f}"
