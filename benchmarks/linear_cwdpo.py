"""A CW-DPO step from hidden states, forward and backward, against eager full logits in the same run (CPU).

Every implementation is first checked against float64; repetitions are interleaved; medians are reported.
`python -m benchmarks.linear_cwdpo [--out FILE] [--repeats N]`
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch

import cwdpo_kernels as ck
from benchmarks.memory import extra_bytes
from benchmarks.workloads import IMPLEMENTATIONS, WORKLOADS, Workload, eager_response_only
from cwdpo_kernels.testing import as_float64, leaves, relative_error

TOLERANCE = 1e-5
RESULTS = Path(__file__).parent / "results" / "linear_cwdpo_cpu.json"


def errors_against_float64(step, inputs) -> dict[str, float]:
    hidden, head, labels, refs = inputs
    hidden64, head64 = as_float64(hidden, head)
    truth = eager_response_only(hidden64, head64, labels, refs)
    loss = step(*inputs)
    errors = {"loss": relative_error(loss, truth)}
    grads = zip(torch.autograd.grad(loss, leaves(hidden, head)), torch.autograd.grad(truth, leaves(hidden64, head64)),
                strict=True)  # fmt: skip
    for name, (actual, expected) in zip(("grad_hidden", "grad_weight"), grads, strict=False):
        errors[name] = relative_error(actual, expected)
    return errors


def seconds(step, inputs) -> float:
    hidden, head, *_ = inputs
    hidden.grad = head.weight.grad = None
    start = time.perf_counter()
    step(*inputs).backward()
    return time.perf_counter() - start


def gemm_rate(workload: Workload) -> float:
    """FLOP/s that torch.mm reaches on a vocabulary tile of this workload: the limit of any implementation."""
    rows, columns = 2 * workload.pairs * workload.response, 2048
    a, b = torch.randn(rows, workload.dim), torch.randn(columns, workload.dim)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(a, b.T)
        times.append(time.perf_counter() - start)
    return 2 * rows * columns * workload.dim / statistics.median(times)


def measure(workload: Workload, repeats: int) -> dict:
    inputs = workload.make()
    results = {}
    for name, step in IMPLEMENTATIONS.items():  # also the warm-up
        errors = errors_against_float64(step, inputs)
        if max(errors.values()) > TOLERANCE:
            raise SystemExit(f"{workload.name}: {name} is wrong, nothing is reported: {errors}")
        results[name] = {"relative_error": errors, "seconds": []}
    rates = []
    for _ in range(repeats):
        for name, step in IMPLEMENTATIONS.items():
            results[name]["seconds"].append(seconds(step, inputs))
        rates.append(gemm_rate(workload))
    for name, result in results.items():
        result["median_seconds"] = statistics.median(result["seconds"])
        result["extra_mib"] = extra_bytes(workload.name, name) / 2**20
    # Products of the labelled rows with the head that the method takes: see portable/linear_logprob.py.
    products = 4 if workload.trainable else 2
    flops = products * 2 * (2 * workload.pairs * workload.response) * workload.vocab * workload.dim
    limit = flops / statistics.median(rates)
    ours, eager = results["cwdpo_kernels"], results["eager"]
    return {
        "workload": workload.record(),
        "results": results,
        "gemm_gflops": statistics.median(rates) / 1e9,
        "fraction_of_gemm_limit": limit / ours["median_seconds"],
        "speedup_over_eager": eager["median_seconds"] / ours["median_seconds"],
    }


def environment() -> dict:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    return {
        "device": f"CPU, {cpu or platform.processor()}, {torch.get_num_threads()} threads",
        "backend": ck.backend("cpu"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cwdpo_kernels": ck.__version__,
        "commit": commit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    report = {"environment": environment(), "measurements": []}
    print(
        f"{'workload':20}{'':16}{'seconds':>9}{'extra MiB':>11}{'max error':>11}{'vs eager':>10}{'of GEMM limit':>15}"
    )
    for workload in WORKLOADS:
        measured = measure(workload, options.repeats)
        report["measurements"].append(measured)
        for name, result in measured["results"].items():
            row = f"{workload.name:20}{name:16}{result['median_seconds']:9.3f}{result['extra_mib']:11.1f}"
            row += f"{max(result['relative_error'].values()):11.1e}"
            if name == "cwdpo_kernels":
                row += f"{measured['speedup_over_eager']:9.1f}x{measured['fraction_of_gemm_limit']:15.2f}"
            print(row, flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
