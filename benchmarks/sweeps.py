"""Time and memory of a step with a frozen head over one size at a time: what the pictures show (CPU).

`response`: tokens of an answer, at a fixed prompt. `vocab`: entries of the vocabulary. `share`: how much of a
sequence of fixed length is the answer; the rest is prompt and picture, which need no logits. Compiled full logits
are left out: they lie between full logits and torch's own op.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import linear
from benchmarks.workloads import Workload

MODE, WITHOUT = "frozen", ("torch.compile, full logits",)
DIM, REPEATS = 512, 3
SWEEPS = {
    "response": {n: Workload(f"response {n}", 1, 256 + n, n, 16384, DIM) for n in (64, 256, 512, 1024)},
    "vocab": {v: Workload(f"vocab {v}", 1, 256, 64, v, DIM) for v in (8192, 16384, 32768, 65536)},
    "share": {n / 512: Workload(f"share {n / 512}", 1, 512, n, 16384, DIM) for n in (16, 64, 256, 512)},
}


def measurements() -> dict[str, Callable]:
    return {
        f"{sweep}/{value}": lambda repeats, call, sweep=sweep, value=value, workload=workload: {
            "sweep": sweep,
            "value": value,
            **linear.measure(workload, MODE, min(repeats, REPEATS), call, WITHOUT),
        }
        for sweep, points in SWEEPS.items()
        for value, workload in points.items()
    }
