"""Tests and benchmarks for a GPU, in one command from the source tree: `python -m benchmarks.gpu --out DIR [--quick]`.

Writes DIR/gpu.json at the end and prints a table. Times are medians of interleaved repetitions, measured with CUDA
events. Each is compared with the peers and with the limit of benchmarks/cost.py, for the GEMM rate and the copy
bandwidth measured in the same run. The run stops if an error of ours exceeds its budget. A peer that fails is listed
with its error.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import cwdpo_kernels as ck
from benchmarks import cost, peers
from benchmarks.workloads import MODELS
from cwdpo_kernels import reference
from cwdpo_kernels.testing import as_float64, check_budget, leaves, make_inputs

ROOT = Path(__file__).parents[1]
TESTS = ["tests/ops", "tests/test_triton_launches.py", "tests/test_registration.py"]
REPEATS, WARM_UP = 9, 3


@dataclass(frozen=True)
class Shape:
    """`tokens`: labelled tokens of all 2P answers."""

    name: str
    tokens: int
    vocab: int
    dim: int

    @classmethod
    def of(cls, model: str, tokens: int) -> Shape:
        return cls(model, tokens, MODELS[model].vocab, MODELS[model].dim)


SHAPES = [
    Shape("trl-issue-7244", 8192, 151936, 4096),  # the issue reports times of the peers on an H100
    Shape.of("Qwen2.5-VL-7B", 4096),
    Shape.of("SmolVLM-256M", 4096),
    Shape.of("Gemma-3-4B", 2048),
]
ANSWERS = 8  # 2P, for peers that take [2P, T, D]


def run_tests(out: Path) -> dict:
    """Run the GPU tests in a subprocess, and a few of them under compute-sanitizer if it is installed."""
    command = [sys.executable, "-m", "pytest", *TESTS, f"--junitxml={out / 'tests.xml'}"]
    result = {"tests": subprocess.run(command, cwd=ROOT, check=False).returncode}
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        few = [sys.executable, "-m", "pytest", "tests/ops", "-k", "triton and budget and bfloat16"]
        command = [sanitizer, "--error-exitcode", "9", *few]
        result["compute_sanitizer"] = subprocess.run(command, cwd=ROOT, check=False).returncode
    return result


def milliseconds(step: Callable[[], object]) -> float:
    """The time of one call on the GPU, by CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(steps: dict[str, Callable]) -> dict[str, dict]:
    """Median times of interleaved repetitions, and the peak of allocated memory above what was allocated before."""
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name, step in steps.items():
            times[name].append(milliseconds(step))
    results = {}
    for name, step in steps.items():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        extra = (torch.cuda.max_memory_allocated() - before) / 2**30
        results[name] = {"ms": statistics.median(times[name]), "all_ms": times[name], "extra_gib": extra}
    return results


def limits(shape: Shape) -> tuple[float, float]:
    """FLOP/s of torch.mm in bfloat16 at this shape, and bytes/s of a large copy (bytes read plus bytes written)."""
    a = torch.randn(shape.tokens, shape.dim, dtype=torch.bfloat16)
    b = torch.randn(min(shape.vocab, 32768), shape.dim, dtype=torch.bfloat16)
    big = torch.empty(1 << 30, dtype=torch.uint8)
    other = torch.empty_like(big)
    times = measure({"mm": lambda: torch.mm(a, b.T), "copy": lambda: other.copy_(big)})
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[0] / times["mm"]["ms"] * 1e3
    return flops, 2 * big.numel() / times["copy"]["ms"] * 1e3


def check_values() -> None:
    """Check values and gradients against the error budget, at a small size but with the shipped tile sizes."""
    hidden, head, labels = make_inputs((300,), 5000, 512, torch.bfloat16)
    results = []
    for function, operands in (
        (ck.linear_logprob, (hidden, head)),
        (reference.linear_logprob, (hidden, head)),
        (reference.linear_logprob, as_float64(hidden, head)),
    ):
        logp = function(*operands, labels)
        results.append((logp, *torch.autograd.grad(logp.sum(), leaves(*operands))))
    for name, values in zip(("logp", "grad_hidden", "grad_weight"), zip(*results, strict=True), strict=True):
        check_budget(name, *values)


def linear_inputs(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [N, D] and weight [V, D] in bfloat16, labels [N]."""
    hidden = torch.randn(shape.tokens, shape.dim, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(shape.vocab, shape.dim, dtype=torch.bfloat16) * shape.dim**-0.5).requires_grad_()
    return hidden, weight, torch.randint(shape.vocab, (shape.tokens,))


def linear_steps(shape: Shape) -> tuple[dict[str, Callable], dict[str, cost.Cost]]:
    """Our steps on hidden states, and the cost of each."""
    hidden, weight, labels = linear_inputs(shape)
    rows = torch.arange(shape.tokens)

    def step(head: torch.Tensor, budget: ck.MemoryBudget = ck.MemoryBudget()) -> None:  # noqa: B008
        logp = ck.linear_logprob(hidden, head, labels, rows=rows, budget=budget)
        torch.autograd.grad(logp.sum(), [x for x in (hidden, head) if x.requires_grad])

    def no_grad() -> None:
        with torch.no_grad():
            ck.linear_logprob(hidden, weight, labels, rows=rows)

    sizes = (shape.tokens, shape.dim, shape.vocab, 2)
    steps = {
        "no_grad": no_grad, "frozen": lambda: step(weight.detach()), "trainable": lambda: step(weight),
        "trainable, none kept": lambda: step(weight, ck.MemoryBudget(kept_bytes=0)),
        "trainable, 4 GiB kept": lambda: step(weight, ck.MemoryBudget(kept_bytes=4 << 30)),
    }  # fmt: skip
    costs = {name: cost.linear_logprob(*sizes, name) for name in ("no_grad", "frozen")}
    in_gradient, of_4_gib = shape.dim / shape.tokens, (4 << 30) / (shape.tokens * shape.vocab * 2)
    for name, share in (("", in_gradient), (", none kept", 0.0), (", 4 GiB kept", of_4_gib)):
        costs["trainable" + name] = cost.linear_logprob(*sizes, "trainable", min(share, 1.0))
    return steps, costs


def peer_steps(shape: Shape, failed: dict[str, str]) -> tuple[dict[str, Callable], dict[str, cost.Cost]]:
    """Forward and backward of each peer, with all tokens labelled. Adds peers that cannot run, and why, to `failed`."""
    hidden, weight, labels = linear_inputs(shape)
    hidden_ATD = hidden.detach().view(ANSWERS, -1, shape.dim).requires_grad_()
    labels_AT, refs = labels.view(ANSWERS, -1), torch.zeros(2, ANSWERS // 2)
    device = hidden.device.type
    failed |= peers.cannot_run(device)

    def step(peer: peers.Implementation, weight: torch.Tensor) -> None:
        head = ck.Head(weight)
        logp = peer.logp or (lambda *args: peer.step(*args, refs))
        value = logp(hidden_ATD, head, labels_AT).sum()
        torch.autograd.grad(value, [x for x in (hidden_ATD, weight) if x.requires_grad])

    steps, costs = {}, {}
    for name, peer in peers.implementations(device).items():
        if peer.package == peers.OURS:
            continue
        for mode, head in (("frozen", weight.detach()), ("trainable", weight)):
            try:  # a failing peer is reported and does not stop the run
                step(peer, head)
            except Exception as error:
                failed[f"{shape.name}, {name}, {mode}"] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            steps[f"{name}, {mode}"] = lambda peer=peer, head=head: step(peer, head)
            costs[f"{name}, {mode}"] = cost.linear_logprob(shape.tokens, shape.dim, shape.vocab, 2, mode)
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


def environment() -> dict:
    import triton

    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "python": sys.version.split()[0], "commit": commit, "versions": peers.versions(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="skip the tests and measure the first shape only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: expected a GPU, got torch.cuda.is_available() == False")
    torch.set_default_device("cuda")
    options.out.mkdir(parents=True, exist_ok=True)
    machine = environment()
    measurements: list[dict] = []
    failed: dict[str, str] = {}
    report = {"environment": machine, "measurements": measurements, "peers_that_failed": failed}
    if not options.quick:
        report |= run_tests(options.out)
    check_values()
    table = []
    for shape in SHAPES[:1] if options.quick else SHAPES:
        flops, bandwidth = limits(shape)
        for make in (linear_steps, lambda shape: peer_steps(shape, failed), logits_steps):
            steps, costs = make(shape)
            for name, result in measure(steps).items():
                result["of_limit"] = costs[name].seconds(flops, bandwidth) * 1e3 / result["ms"]
                measurements.append({"shape": shape.name, "op": name, **result})
                table.append(
                    f"{shape.name:16}{name:48}{result['ms']:9.2f}{result['extra_gib']:11.2f}{result['of_limit']:10.2f}"
                )
            del steps
            torch.cuda.empty_cache()
        report[f"limits {shape.name}"] = {"gemm_tflops": flops / 1e12, "copy_gb_per_s": bandwidth / 1e9}
    (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{machine['device']}; exit code of the tests: {report.get('tests', 'not run')}")
    print(f"{'shape':16}{'op':48}{'ms':>9}{'extra GiB':>11}{'of limit':>10}")
    print("\n".join(table))
    for name, reason in failed.items():
        print(f"did not run: {name} ({reason})")


if __name__ == "__main__":
    main()
