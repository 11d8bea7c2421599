"""Values, benchmarks and tests on a GPU from the source tree: `python -m benchmarks.gpu --out DIR [--parts PART ...]`.

Parts, in order: `values` (errors against float64), `limits` (GEMM rate, the bare GEMMs of each shape, copy bandwidth),
`ours`, `logits`, `peers` and `tests`. DIR/gpu.json is written anew after every row, so an interrupted run keeps what it
measured. Each peer runs in a process of its own with a time limit. A part that fails is a row in `failed`.

Times are medians of interleaved repetitions, measured with CUDA events behind a busy GPU, so that launches do not
count. Each is compared with the limit of benchmarks/cost.py, for the GEMM rate and copy bandwidth of the same run.
Nothing is timed after an error of ours that exceeds its budget.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import cwdpo_kernels as ck
from benchmarks import cost, gpu_peers, peers
from benchmarks.gpu_measure import SHAPES, Report, Shape, linear_inputs, measure
from cwdpo_kernels import reference
from cwdpo_kernels.testing import as_float64, check_budget, confident_inputs, leaves, make_inputs, relative_error

ROOT = Path(__file__).parents[1]
TESTS = ["tests/ops", "tests/test_triton_launches.py", "tests/test_registration.py"]
PARTS = ("values", "limits", "ours", "logits", "peers", "tests")
TEST_SECONDS = 600


def check_values(tokens: int = 300, vocab: int = 5000, dim: int = 512) -> list[dict]:
    """Relative errors against float64, ours and eager's in the same dtype. Raises if one of ours exceeds its budget.

    Small shapes with the shipped tile sizes; the labels of the last inputs have probability 0.999.
    """
    inputs = {
        "bfloat16": make_inputs((tokens,), vocab, dim, torch.bfloat16),
        "float16, bias, softcap 30": make_inputs((tokens,), vocab, dim, torch.float16, bias=True, softcap=30.0),
        "float32": make_inputs((tokens,), vocab, dim, torch.float32),
        "bfloat16, p 0.999": confident_inputs(0.999, tokens, vocab, dim, torch.bfloat16),
    }
    rows = []
    for case, (hidden, head, labels) in inputs.items():
        results = []
        for function, operands in (
            (ck.linear_logprob, (hidden, head)),
            (reference.linear_logprob, (hidden, head)),
            (reference.linear_logprob, as_float64(hidden, head)),
        ):
            logp = function(*operands, labels)
            results.append((logp, *torch.autograd.grad(logp.sum(), leaves(*operands))))
        names = ("logp", "grad_hidden", "grad_weight", "grad_bias")
        for name, (actual, eager, truth) in zip(names, zip(*results, strict=True), strict=False):
            check_budget(f"{case}: {name}", actual, eager, truth)
            errors = {"error": relative_error(actual, truth), "eager_error": relative_error(eager, truth)}
            rows.append({"case": case, "value": name, **errors})
    return rows


def limits(shape: Shape) -> dict[str, dict]:
    """The bare GEMMs of this shape in bfloat16 (logits, grad_hidden, grad_weight), and a large copy."""
    hidden, weight, _ = linear_inputs(shape)
    hidden, weight = hidden.detach(), weight.detach()
    logits = torch.randn(shape.tokens, shape.vocab, dtype=torch.bfloat16)
    big = torch.empty(1 << 30, dtype=torch.uint8)
    other = torch.empty_like(big)
    return measure({
        "logits": lambda: torch.mm(hidden, weight.T), "grad_hidden": lambda: torch.mm(logits, weight),
        "grad_weight": lambda: torch.mm(logits.T, hidden), "copy": lambda: other.copy_(big),
    })  # fmt: skip


def rates(shape: Shape, times: dict[str, dict]) -> tuple[float, float]:
    """FLOP/s of the logits' GEMM, and bytes/s of the copy (bytes read plus bytes written)."""
    flops = 2.0 * shape.tokens * shape.dim * shape.vocab / times["logits"]["ms"] * 1e3
    return flops, 2.0 * (1 << 30) / times["copy"]["ms"] * 1e3


def linear_steps(shape: Shape) -> tuple[dict[str, Callable], dict[str, cost.Cost]]:
    """Our steps on hidden states, and the cost of each."""
    hidden, weight, labels = linear_inputs(shape)
    rows = torch.arange(shape.tokens)

    def step(head: torch.Tensor, budget: ck.MemoryBudget = ck.MemoryBudget()) -> None:  # noqa: B008
        logp = ck.linear_logprob(hidden, head, labels, rows=rows, budget=budget)
        torch.autograd.grad(logp.sum(), [x for x in (hidden, head) if x.requires_grad])

    def without_gradient(function: Callable, *args: object) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                function(*args)

        return run

    sizes = (shape.tokens, shape.dim, shape.vocab, 2)
    steps = {
        "no_grad": without_gradient(lambda: ck.linear_logprob(hidden, weight, labels, rows=rows)),
        "frozen": lambda: step(weight.detach()), "trainable": lambda: step(weight),
        "trainable, none kept": lambda: step(weight, ck.MemoryBudget(kept_bytes=0)),
        "trainable, 4 GiB kept": lambda: step(weight, ck.MemoryBudget(kept_bytes=4 << 30)),
        "token_stats": without_gradient(ck.token_stats, hidden, weight, labels),
        "token_divergence": without_gradient(ck.token_divergence, hidden, weight, hidden, weight),
    }  # fmt: skip
    costs = {name: cost.linear_logprob(*sizes, name) for name in ("no_grad", "frozen")}
    in_gradient, of_4_gib = shape.dim / shape.tokens, (4 << 30) / (shape.tokens * shape.vocab * 2)
    for name, share in (("", in_gradient), (", none kept", 0.0), (", 4 GiB kept", of_4_gib)):
        costs["trainable" + name] = cost.linear_logprob(*sizes, "trainable", min(share, 1.0))
    costs["token_stats"] = cost.token_stats(*sizes)
    costs["token_divergence"] = cost.token_divergence(shape.tokens, shape.dim, shape.dim, shape.vocab, 2)
    return steps, costs


def logits_steps(shape: Shape) -> tuple[dict[str, Callable], dict[str, cost.Cost]]:
    """Our steps on logits, and the cost of each."""
    logits = torch.randn(shape.tokens, shape.vocab, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(shape.vocab, (shape.tokens,))

    def forward() -> None:
        with torch.no_grad():
            ck.logits_logprob(logits, labels)

    steps = {
        "logits forward": forward,
        "logits": lambda: torch.autograd.grad(ck.logits_logprob(logits, labels).sum(), logits),
    }
    costs = {"logits forward": cost.logits_logprob(shape.tokens, shape.vocab, 2, backward=False)}
    costs["logits"] = cost.logits_logprob(shape.tokens, shape.vocab, 2, backward=True)
    return steps, costs


def run_tests(out: Path) -> dict:
    """Run the GPU tests in a subprocess, and a few of them under compute-sanitizer if it is installed."""
    command = [sys.executable, "-m", "pytest", *TESTS, "-k", "not portable and not csrc"]
    command += [f"--junitxml={out / 'tests.xml'}"]
    if importlib.util.find_spec("xdist"):  # most of the time goes to compilation, on the host
        command += ["-n", str(os.cpu_count()), "-p", "no:benchmark"]
    result = {"tests": subprocess.run(command, cwd=ROOT, check=False, timeout=TEST_SECONDS).returncode}
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        few = [sys.executable, "-m", "pytest", "tests/ops", "-k", "triton and budget and bfloat16"]
        command = [sanitizer, "--error-exitcode", "9", *few]
        run = subprocess.run(command, cwd=ROOT, check=False, timeout=TEST_SECONDS)
        result["compute_sanitizer"] = run.returncode
    return result


def environment(commit: str) -> dict:
    import triton

    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "python": sys.version.split()[0], "commit": commit or current_commit(), "versions": peers.versions(),
    }  # fmt: skip


def current_commit() -> str:
    """The commit of the source tree, or "" without git."""
    if not shutil.which("git"):
        return ""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def measure_limits(report: Report, shape: Shape) -> None:
    times = limits(shape)
    flops, bandwidth = rates(shape, times)
    report.data["limits"][shape.name] = {
        "flops_per_s": flops, "bytes_per_s": bandwidth,
        "gemm_ms": {name: times[name]["ms"] for name in ("logits", "grad_hidden", "grad_weight")},
    }  # fmt: skip
    report.write()


def measure_ours(report: Report, shape: Shape, make: Callable) -> None:
    steps, costs = make(shape)
    for name, result in measure(steps).items():
        report.measured(shape.name, name, result, costs[name])


def run(report: Report, parts: list[str], shapes: list[Shape], out: Path) -> None:
    """Run `parts` in order on all shapes. Stops if a value is wrong."""
    if "values" in parts:
        report.data["values"] = check_values()
        report.write()
    for part, work in (
        ("limits", measure_limits),
        ("ours", functools.partial(measure_ours, make=linear_steps)),
        ("logits", functools.partial(measure_ours, make=logits_steps)),
    ):
        for shape in shapes if part in parts else []:
            report.attempt(f"{shape.name}, {part}", functools.partial(work, report, shape))
            torch.cuda.empty_cache()
    if "peers" in parts:
        gpu_peers.run_all(report, shapes, out)
    if "tests" in parts:
        report.attempt("tests", lambda: report.data.update(run_tests(out)))
    report.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--shapes", nargs="+", choices=[s.name for s in SHAPES], default=[s.name for s in SHAPES])
    parser.add_argument("--budget-s", type=float, default=math.inf, help="start nothing new after this many seconds")
    parser.add_argument("--commit", default="", help="the commit, where the source tree has no git")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: expected a GPU, got torch.cuda.is_available() == False")
    torch.set_default_device("cuda")
    shapes = [shape for shape in SHAPES if shape.name in options.shapes]
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out / "gpu.json", options.budget_s, environment=environment(options.commit))
    run(report, options.parts, shapes, options.out)
    print(f"{report.data['environment']['device']}; {options.out / 'gpu.json'}")


if __name__ == "__main__":
    main()
