"""A CW-DPO step from hidden states, forward and backward, beside its peers in the same process (CPU).

Every implementation is first compared with float64, and nothing is reported if ours is off; repetitions are
interleaved; medians are reported. `python -m benchmarks.linear_cwdpo [--out FILE] [--repeats N] [--only NAME ...]`
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import cwdpo_kernels as ck
from benchmarks import workloads
from benchmarks.memory import extra_bytes
from benchmarks.workloads import WORKLOADS, Implementation, Workload
from cwdpo_kernels import reference
from cwdpo_kernels.ops.linear_logprob import KEPT_BYTES_ON_A_CPU
from cwdpo_kernels.testing import as_float64, leaves, relative_error

# Ours: log-probs and the loss are of float32 quality in every dtype; a gradient is rounded to its own.
VALUE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
SLOW_REPEATS, SLOW_SECONDS = 3, 5.0  # what takes so long needs fewer repetitions
TILE = 1024  # columns of a vocabulary tile in float32
RESULTS = Path(__file__).parent / "results" / "linear_cwdpo_cpu.json"
NAMES = ("logp", "loss", "grad_hidden", "grad_weight")


def outcome(implementation: Implementation, hidden, head, labels, refs) -> list[torch.Tensor]:
    """Log-probs of the labelled tokens, loss and gradients."""
    loss = implementation.step(hidden, head, labels, refs)
    grads = torch.autograd.grad(loss, leaves(hidden, head))
    with torch.no_grad():
        logp = implementation.logp(hidden, head, labels)[labels != -100]
    return [logp, loss.detach(), *grads]


def float64_truth(hidden, head, labels, refs) -> list[torch.Tensor]:
    """Full logits of the labelled positions only: affordable in float64."""
    first = int((labels[0] != -100).nonzero()[0])
    hidden64, head64 = as_float64(hidden, head)
    truth = workloads.of_logp("torch", lambda h, w, y: reference.linear_logprob(h[:, first:], w, y[:, first:]))
    logp = truth.logp(hidden64, head64, labels)
    loss = workloads.loss_of(logp, labels[:, first:], refs)
    grads = torch.autograd.grad(loss, leaves(hidden64, head64))
    return [logp.detach()[labels[:, first:] != -100], loss.detach(), *grads]


def errors(workload: Workload, inputs, found: dict[str, Implementation]) -> dict[str, dict[str, float]]:
    """Of each implementation, relative to float64; also the warm-up. Stops if ours is outside its tolerance."""
    truth = float64_truth(*inputs)
    result = {}
    for name, implementation in found.items():
        values = outcome(implementation, *inputs)
        result[name] = {what: relative_error(a, b) for what, a, b in zip(NAMES, values, truth, strict=False)}
        for what, error in result[name].items():
            allowed = GRADIENT_TOLERANCE[workload.dtype] if what.startswith("grad") else VALUE_TOLERANCE
            if implementation.package == "cwdpo-kernels" and not error <= allowed:
                raise SystemExit(f"{workload.name}: {name} is wrong, nothing is reported: {what} is off by {error:.2g}")
    return result


def seconds(step: Callable, inputs) -> float:
    hidden, head, *_ = inputs
    hidden.grad = head.weight.grad = None
    start = time.perf_counter()
    step(*inputs).backward()
    return time.perf_counter() - start


def gemm_seconds(workload: Workload) -> dict[str, float]:
    """What torch.mm takes for each product of a whole vocabulary, on tiles of the shapes that ours has, in float32."""
    rows, dim, tiles = workload.labelled, workload.dim, 8
    hidden, logits, grad_hidden = torch.randn(rows, dim), torch.randn(TILE, rows), torch.zeros(rows, dim)
    weight, out = torch.randn(tiles * TILE, dim), torch.zeros(tiles * TILE, dim)
    products = {
        "logits": lambda tile: torch.mm(weight[tile], hidden.T, out=logits),
        "grad_hidden": lambda tile: torch.addmm(grad_hidden, logits.T, weight[tile], out=grad_hidden),
        "grad_weight": lambda tile: torch.mm(logits, hidden, out=out[tile]),
    }
    result = {}
    for name, product in products.items():
        start = time.perf_counter()
        for i in range(tiles):
            product(slice(i * TILE, (i + 1) * TILE))
        result[name] = (time.perf_counter() - start) * workload.vocab / (tiles * TILE)
    return result


def gemm_limit(workload: Workload, implementation: Implementation, gemm: dict[str, float]) -> float:
    """Seconds of the products that the method takes: see portable/linear_logprob.py."""
    if not workload.trainable:
        return gemm["logits"] + gemm["grad_hidden"]
    tiles = workload.labelled * workload.vocab * 4
    budget = KEPT_BYTES_ON_A_CPU if implementation.kept_bytes is None else implementation.kept_bytes
    kept = min(budget / tiles, 1.0)
    return (2 - kept) * gemm["logits"] + gemm["grad_hidden"] + gemm["grad_weight"]


def measure(workload: Workload, repeats: int) -> dict:
    inputs = workload.make()
    found = workloads.applicable(workload)
    results = {
        name: {"relative_error": error, "seconds": []} for name, error in errors(workload, inputs, found).items()
    }
    gemm: list[dict[str, float]] = []
    for repeat in range(repeats):
        for name, implementation in found.items():
            times = results[name]["seconds"]
            if repeat < SLOW_REPEATS or times[0] < SLOW_SECONDS:
                times.append(seconds(implementation.step, inputs))
        gemm.append(gemm_seconds(workload))
    medians = {key: statistics.median(times[key] for times in gemm) for key in gemm[0]}
    for name, result in results.items():
        result["median_seconds"] = statistics.median(result["seconds"])
        result["extra_mib"] = extra_bytes(workload.name, name) / 2**20
        if found[name].package == "cwdpo-kernels":
            result["fraction_of_gemm_limit"] = gemm_limit(workload, found[name], medians) / result["median_seconds"]
    for result in results.values():
        result["time_against_cut_cross_entropy"] = (
            result["median_seconds"] / results["cut_cross_entropy"]["median_seconds"]
            if "cut_cross_entropy" in results
            else None
        )
    return {"workload": workload.record(), "gemm_seconds": medians, "results": results}


def environment() -> dict:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    return {
        "device": f"CPU, {cpu or platform.processor()}, {torch.get_num_threads()} threads",
        "backend": ck.backend("cpu"),
        "python": platform.python_version(),
        "cwdpo_kernels": ck.__version__,
        "commit": commit,
        "versions": workloads.versions(),
        "cannot_run_here": workloads.missing_peers(),
    }


def print_row(workload: str, name: str, result: dict) -> None:
    error = result["relative_error"]
    gradient = max(value for what, value in error.items() if what.startswith("grad"))
    ratio, fraction = result["time_against_cut_cross_entropy"], result.get("fraction_of_gemm_limit")
    print(
        f"{workload:24}{name:26}{result['median_seconds']:9.3f}{'' if ratio is None else f'{ratio:.2f}':>9}"
        f"{result['extra_mib']:11.1f}{error['logp']:11.1e}{gradient:11.1e}"
        f"{'' if fraction is None else f'{fraction:.2f}':>10}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", nargs="*", choices=[workload.name for workload in WORKLOADS])
    options = parser.parse_args()

    report = {"environment": environment(), "measurements": []}
    columns = f"{'seconds':>9}{'/ cce':>9}{'extra MiB':>11}{'logp err':>11}{'grad err':>11}{'of GEMM':>10}"
    print(f"{'workload':24}{'':26}{columns}")
    for workload in WORKLOADS:
        if options.only and workload.name not in options.only:
            continue
        measured = measure(workload, options.repeats)
        report["measurements"].append(measured)
        for name, result in measured["results"].items():
            print_row(workload.name, name, result)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
