"""Benchmark of a step with a frozen head, varying one size at a time (CPU). The plots show these results.

response: tokens per answer, with a fixed prompt. vocab: vocabulary size. share: the fraction of a sequence of fixed
length that is the answer; prompt and image need no logits. The compiled variant of full logits is left out, because it
lies between full logits and torch's own op.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import linear
from benchmarks.workloads import Workload

MODE, WITHOUT = "frozen", ("torch.compile, full logits",)
DIM, REPEATS = 512, 3
SWEEPS: dict[str, dict[float, Workload]] = {
    "response": {n: Workload(f"response {n}", 1, 256 + n, n, 16384, DIM) for n in (64, 256, 512, 1024)},
    "vocab": {v: Workload(f"vocab {v}", 1, 256, 64, v, DIM) for v in (8192, 16384, 32768, 65536)},
    "share": {n / 512: Workload(f"share {n / 512}", 1, 512, n, 16384, DIM) for n in (16, 64, 256, 512)},
}


def measurements() -> dict[str, Callable[..., dict]]:
    """Name -> measurement (see run.SUITES)."""
    return {
        f"{sweep}/{value}": lambda repeats, call, sweep=sweep, value=value, workload=workload: {
            "sweep": sweep,
            "value": value,
            **linear.measure(workload, MODE, min(repeats, REPEATS), call, WITHOUT),
        }
        for sweep, points in SWEEPS.items()
        for value, workload in points.items()
    }
