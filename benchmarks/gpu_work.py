"""What each kind of item of `benchmarks.gpu` does, in the child process that has the GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import cwdpo_kernels as ck
from benchmarks import cost, gpu_measure, gpu_peers, gpu_tests
from benchmarks.gpu_measure import linear_inputs
from benchmarks.gpu_plan import VALUES
from benchmarks.models import Shape
from cwdpo_kernels import reference
from cwdpo_kernels.testing import as_float64, check_budget, confident_inputs, leaves, make_inputs, relative_error

DEVICE = "cuda"
VALUE_SIZE = (300, 5000, 512)  # tokens, V, D: several tiles of the shipped sizes, whole and partial
COPIED_BYTES = 1 << 30
Emit = Callable[[str, dict], None]


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def synchronize() -> None:
    """Wait for the device. Raises what a kernel did wrong."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def device_works() -> bool:
    """Whether the device still takes work from this process."""
    try:
        torch.ones(1).add_(1)
        synchronize()
    except Exception:
        return False
    return True


def do(request: dict, out: Path, descriptor: int, emit: Emit) -> None:
    """Do an item. `emit(kind, row)` sends a row to the parent; `descriptor` is the pipe that it goes through."""
    shapes = [Shape(**shape) for shape in request["shapes"]]
    kind, op = request["kind"], request["op"]
    if kind == "compile":
        emit("compiled", {request["name"]: compile_ahead(shapes)})
    elif kind == "values":
        check_values(op, *VALUE_SIZE, emit=functools.partial(emit, "values"))
    elif kind == "limits":
        emit("limits", {shapes[0].name: limits(shapes[0])})
    elif kind == "tests":
        emit("tests", gpu_tests.do(op, out, descriptor))
    elif kind == "sharing":
        from benchmarks import gpu_sharing  # needs transformers

        gpu_sharing.do(op, emit=functools.partial(emit, "shared"))
    elif kind in ("tune", "tune compile"):
        from benchmarks import tune_work  # needs Triton

        tune_work.do(kind, op, shapes[0], emit)
    else:
        step, needed = STEPS[kind](shapes[0], op)
        result = gpu_measure.measure({op: step})[op]
        needs = {"flops": needed.flops, "bytes": needed.bytes}
        emit("measurements", {"shape": shapes[0].name, "op": op, **result, **needs})
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def value_inputs(case: str, tokens: int, vocab: int, dim: int) -> tuple[Tensor, ck.Head, Tensor]:
    """The inputs of a case of VALUES; "p 0.999" is the probability of its labels."""
    if case == "bfloat16, p 0.999":
        return confident_inputs(0.999, tokens, vocab, dim, torch.bfloat16)
    if case == "float16, bias, softcap 30":
        return make_inputs((tokens,), vocab, dim, torch.float16, bias=True, softcap=30.0)
    return make_inputs((tokens,), vocab, dim, {"bfloat16": torch.bfloat16, "float32": torch.float32}[case])


def value_and_gradients(function: Callable, hidden: Tensor, head: ck.Head, labels: Tensor) -> tuple[Tensor, ...]:
    logp = function(hidden, head, labels)
    return logp, *torch.autograd.grad(logp.sum(), leaves(hidden, head))


def check_values(case: str, tokens: int, vocab: int, dim: int, emit: Callable[[dict], None]) -> None:
    """Emit relative errors against float64, ours and eager's in the same dtype. Raises if one of ours is too large."""
    hidden, head, labels = value_inputs(case, tokens, vocab, dim)
    actual = value_and_gradients(ck.linear_logprob, hidden, head, labels)
    eager = value_and_gradients(reference.linear_logprob, hidden, head, labels)
    truth = value_and_gradients(reference.linear_logprob, *as_float64(hidden, head), labels)
    rows = list(zip(("logp", "grad_hidden", "grad_weight", "grad_bias"), actual, eager, truth, strict=False))
    for name, ours, other, right in rows:
        errors = {"error": relative_error(ours, right), "eager_error": relative_error(other, right)}
        emit({"case": case, "value": name, **errors})
    for name, ours, other, right in rows:
        check_budget(f"{case}: {name}", ours, other, right)


def limits(shape: Shape) -> dict:
    """The bare GEMMs of this shape in bfloat16 (logits, grad_hidden, grad_weight), and the rate of a large copy.

    FLOP/s are those of the logits' GEMM. Bytes/s count bytes read and bytes written.
    """
    hidden, weight, _ = linear_inputs(shape)
    hidden, weight = hidden.detach(), weight.detach()
    logits = torch.randn(shape.tokens, shape.vocab, dtype=torch.bfloat16)
    big = torch.empty(COPIED_BYTES, dtype=torch.uint8)
    other = torch.empty_like(big)
    times = gpu_measure.measure({
        "logits": lambda: torch.mm(hidden, weight.T), "grad_hidden": lambda: torch.mm(logits, weight),
        "grad_weight": lambda: torch.mm(logits.T, hidden), "copy": lambda: other.copy_(big),
    })  # fmt: skip
    return {
        "flops_per_s": 2.0 * shape.tokens * shape.dim * shape.vocab / times["logits"]["ms"] * 1e3,
        "bytes_per_s": 2.0 * COPIED_BYTES / times["copy"]["ms"] * 1e3,
        "gemm_ms": {name: times[name]["ms"] for name in ("logits", "grad_hidden", "grad_weight")},
    }


def linear_steps(shape: Shape) -> dict[str, tuple[Callable, cost.Cost]]:
    """Our steps on hidden states, and the cost of each."""
    hidden, weight, labels = linear_inputs(shape)
    rows = torch.arange(shape.tokens)
    half = torch.ones(shape.tokens).view(8, -1)
    half[::2] = 0  # no gradient for every second of eight answers

    def step(head: Tensor, budget: ck.MemoryBudget = ck.MemoryBudget()) -> None:  # noqa: B008
        logp = ck.linear_logprob(hidden, head, labels, rows=rows, budget=budget)
        torch.autograd.grad(logp.sum(), [x for x in (hidden, head) if x.requires_grad])

    def partly(sparse_grad: bool) -> None:
        logp, *_ = torch.ops.cwdpo.linear_logprob(
            hidden, weight, None, labels, 1.0, None, ck.IGNORE_INDEX, False, sparse_grad, 0, 0
        )
        torch.autograd.grad(logp, [hidden, weight], half.view(-1))

    def without_gradient(function: Callable, *args: object, **options: object) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                function(*args, **options)

        return run

    def needed(mode: str, kept_share: float = 0.0, tokens: int = shape.tokens) -> cost.Cost:
        return cost.linear_logprob(tokens, shape.dim, shape.vocab, 2, mode, min(kept_share, 1.0))

    forward, few = needed("no_grad"), shape.tokens // 2
    backward = [needed(mode, tokens=few) for mode in ("trainable", "no_grad")]
    halved = cost.Cost(  # forward of all tokens, backward of half of them
        forward.flops + backward[0].flops - backward[1].flops, forward.bytes + backward[0].bytes - backward[1].bytes
    )
    return {
        "no_grad": (without_gradient(ck.linear_logprob, hidden, weight, labels, rows=rows), forward),
        "frozen": (lambda: step(weight.detach()), needed("frozen")),
        "trainable": (lambda: step(weight), needed("trainable", shape.dim / shape.tokens)),
        "trainable, none kept": (lambda: step(weight, ck.MemoryBudget(kept_bytes=0)), needed("trainable")),
        "trainable, 4 GiB kept": (
            lambda: step(weight, ck.MemoryBudget(kept_bytes=4 << 30)),
            needed("trainable", (4 << 30) / (shape.tokens * shape.vocab * 2)),
        ),
        "token_stats": (
            without_gradient(ck.token_stats, hidden, weight, labels, rows=rows),
            cost.token_stats(shape.tokens, shape.dim, shape.vocab, 2),
        ),
        "token_divergence": (
            without_gradient(ck.token_divergence, hidden, weight, hidden, weight),
            cost.token_divergence(shape.tokens, shape.dim, shape.dim, shape.vocab, 2),
        ),
        "half of the gradients 0, dense": (lambda: partly(False), halved),
        "half of the gradients 0, sparse": (lambda: partly(True), halved),
    }


def logits_steps(shape: Shape) -> dict[str, tuple[Callable, cost.Cost]]:
    """Our steps on logits, and the cost of each."""
    logits = torch.randn(shape.tokens, shape.vocab, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(shape.vocab, (shape.tokens,))

    def forward() -> None:
        with torch.no_grad():
            ck.logits_logprob(logits, labels)

    def needed(backward: bool) -> cost.Cost:
        return cost.logits_logprob(shape.tokens, shape.vocab, 2, backward)

    return {
        "logits forward": (forward, needed(False)),
        "logits": (lambda: torch.autograd.grad(ck.logits_logprob(logits, labels).sum(), logits), needed(True)),
    }


STEPS: dict[str, Callable] = {
    "linear": lambda shape, op: linear_steps(shape)[op], "logits": lambda shape, op: logits_steps(shape)[op],
    "peer": gpu_peers.step_of,
}  # fmt: skip


def compile_ahead(shapes: list[Shape]) -> dict:
    """Compile what the values and our timings launch. The steps run without our kernels, so results mean nothing."""
    from benchmarks import ahead

    with ahead.recorded() as launches:
        for case in VALUES:
            value_and_gradients(ck.linear_logprob, *value_inputs(case, *VALUE_SIZE))
        for shape in shapes:
            for steps in (linear_steps(shape), logits_steps(shape)):
                for step, _ in steps.values():
                    step()
    return ahead.summary(launches)
