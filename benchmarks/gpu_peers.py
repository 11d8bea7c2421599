"""Peers on a GPU: each runs in a process of its own, so that one that crashes the device's context stops only itself.

`python -m benchmarks.gpu_peers --out FILE --peer NAME --shapes NAME ...` is that process.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import cwdpo_kernels as ck
from benchmarks import cost, gpu_measure, peers
from benchmarks.gpu_measure import Report, Shape

ANSWERS = 8  # 2P: peers take [2P, T, D]
ROOT = Path(__file__).parents[1]
SECONDS = 120  # for one peer on all shapes


def steps_of(name: str, shape: Shape) -> dict[str, Callable[[], None]]:
    """Mode -> forward and backward of a peer, with all tokens labeled."""
    hidden, weight, labels = gpu_measure.linear_inputs(shape)
    hidden_ATD = hidden.detach().view(ANSWERS, -1, shape.dim).requires_grad_()
    labels_AT, refs = labels.view(ANSWERS, -1), torch.zeros(2, ANSWERS // 2)
    peer = peers.implementations(hidden.device.type)[name]

    def step(weight: torch.Tensor) -> None:
        head = ck.Head(weight)
        logp = peer.logp or (lambda *args: peer.step(*args, refs))
        value = logp(hidden_ATD, head, labels_AT).sum()
        torch.autograd.grad(value, [x for x in (hidden_ATD, weight) if x.requires_grad])

    return {"frozen": lambda: step(weight.detach()), "trainable": lambda: step(weight)}


def measure(report: Report, name: str, shape: Shape) -> None:
    """Measure the modes of a peer that run. The others are failures of the report."""
    steps = {}
    for mode, step in steps_of(name, shape).items():
        op = f"{name}, {mode}"
        report.attempt(f"{shape.name}, {op}", step)
        if f"{shape.name}, {op}" not in report.data["failed"]:
            steps[op] = step
    for op, result in gpu_measure.measure(steps).items():
        report.measured(shape.name, op, result, needed(shape, op))


def needed(shape: Shape, op: str) -> cost.Cost:
    """What the mode of `op` ("NAME, MODE") needs at least."""
    return cost.linear_logprob(shape.tokens, shape.dim, shape.vocab, 2, op.rsplit(", ", 1)[1])


def run_all(report: Report, shapes: list[Shape], out: Path) -> None:
    """Measure every peer that can run. A peer that crashes or takes too long is a failure of the report."""
    for name, reason in peers.cannot_run("cuda").items():
        report.fail(name, reason)
    for name, peer in peers.implementations("cuda").items():
        if peer.package != peers.OURS:
            report.attempt(name, functools.partial(run_one, report, name, shapes, out / "peer.json"))


def run_one(report: Report, name: str, shapes: list[Shape], path: Path) -> None:
    """Run the process of a peer, then add the rows that it wrote, finished or not."""
    command = [sys.executable, "-m", "benchmarks.gpu_peers", "--out", str(path), "--peer", name]
    command += ["--shapes", *(shape.name for shape in shapes)]
    path.unlink(missing_ok=True)
    try:
        limit = min(SECONDS, report.seconds_left())
        subprocess.run(command, cwd=ROOT, check=True, timeout=limit, stdout=subprocess.DEVNULL)
    finally:
        if path.exists():
            merge(report, json.loads(path.read_text()), shapes)
            path.unlink()


def merge(report: Report, found: dict, shapes: list[Shape]) -> None:
    """Add the rows and failures of a peer's report."""
    by_name = {shape.name: shape for shape in shapes}
    for row in found["measurements"]:
        shape, op = by_name[row.pop("shape")], row.pop("op")
        report.measured(shape.name, op, row, needed(shape, op))
    for name, reason in found["failed"].items():
        report.fail(name, reason)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--shapes", nargs="+", required=True)
    options = parser.parse_args()
    torch.set_default_device("cuda")
    report = Report(options.out)
    for shape in gpu_measure.SHAPES:
        if shape.name in options.shapes:
            report.attempt(f"{shape.name}, {options.peer}", functools.partial(measure, report, options.peer, shape))
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
