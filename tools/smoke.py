"""Test an installed cwdpo_kernels: every op against the float64 reference, forward and backward.

Needs torch and the package, nothing else. `make wheel` runs it in the environments it installs the wheel into.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cwdpo_kernels as ck
from cwdpo_kernels import reference
from cwdpo_kernels._ops import add_op_namespace_prefix, ops
from cwdpo_kernels.testing import as_float64, leaves, make_inputs, relative_error

PREFIX = add_op_namespace_prefix("")  # of this package's ops
TOLERANCE = 2e-6  # relative, float32 against float64
VOCAB, DIM = 507, 123
BETA, COOLING = 0.1, ck.Cooling(logp_floor=-6.0)
REFS = torch.tensor([-40.0, -60.0]), torch.tensor([-50.0, -70.0])  # the reference's log-probs: chosen, rejected
REFS64 = REFS[0].double(), REFS[1].double()


class UsedOps(TorchDispatchMode):
    """Records the names of this package's ops that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
        if func._schema.name.startswith(PREFIX):
            self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def check(name: str, actual: Tensor, expected: Tensor) -> None:
    error = relative_error(actual, expected)
    if not error <= TOLERANCE:
        sys.exit(f"smoke: expected {name} to have relative error <= {TOLERANCE}, got {error:.3g}")


def compare(name: str, actual: Tensor, expected: Tensor, inputs: list[Tensor], inputs64: list[Tensor]) -> None:
    """Values, and the gradients of a weighted sum of them with regard to every input."""
    check(name, actual, expected)
    weights = torch.linspace(0.5, 1.5, actual.numel()).view(actual.shape)
    grads = torch.autograd.grad((actual * weights).sum(), inputs)
    grads64 = torch.autograd.grad((expected * weights).sum(), inputs64, retain_graph=True)
    for index, (grad, grad64) in enumerate(zip(grads, grads64, strict=True)):
        check(f"the gradient {index} of {name}", grad, grad64)


def sequences(logp: Tensor, labels: Tensor) -> tuple[ck.SequenceLogprob, ck.SequenceLogprob]:
    """The reference's log-probs of the chosen and of the rejected answers."""
    each = reference.sequence_logprob(logp, labels)
    return ck.SequenceLogprob(*(x[:2] for x in each)), ck.SequenceLogprob(*(x[2:] for x in each))


def linear_ops() -> None:
    """From hidden states: a trainable head with and without kept tiles, then a frozen one."""
    hidden, head, labels = make_inputs((4, 9), VOCAB, DIM, bias=True, scale=0.7, softcap=20.0)
    hidden64, head64 = as_float64(hidden, head)
    inputs, inputs64 = leaves(hidden, head), leaves(hidden64, head64)
    logp64 = reference.linear_logprob(hidden64, head64, labels)
    for kept_bytes in (None, 0):
        logp = ck.linear_logprob(hidden, head, labels, budget=ck.MemoryBudget(kept_bytes=kept_bytes))
        compare("linear_logprob", logp, logp64, inputs, inputs64)
    mean = ck.linear_sequence_logprob(hidden, head, labels).mean
    compare("linear_sequence_logprob", mean, reference.sequence_logprob(logp64, labels).mean, inputs, inputs64)
    loss = ck.linear_cwdpo_loss(hidden, head, labels, *REFS, beta=BETA, cooling=COOLING).loss
    loss64 = reference.cwdpo_loss(*sequences(logp64, labels), *REFS64, BETA, COOLING)
    compare("linear_cwdpo_loss", loss, loss64, inputs, inputs64)
    for negatives in (ck.GentleNegatives(nll_floor=9.0), ck.GentleNegatives(mode="smoothed")):
        plain, plain64 = ck.Head(head.weight, head.bias), ck.Head(head64.weight, head64.bias)
        loss = ck.linear_constrained_sft_loss(hidden, plain, labels, negatives=negatives).loss
        logits64 = reference.head_logits(hidden64, plain64)
        loss64 = reference.constrained_sft_loss(logits64, labels, negatives)
        compare(f"linear_constrained_sft_loss, {negatives.mode}", loss, loss64, inputs, inputs64)
    for tensor in inputs[1:]:
        tensor.requires_grad_(False)
    compare("linear_logprob, frozen", ck.linear_logprob(hidden, head, labels), logp64, inputs[:1], inputs64[:1])


def logits_ops() -> None:
    """From logits, with and without reuse of their memory for the gradient."""
    _, _, labels = make_inputs((4, 9), VOCAB, 1)
    logits = torch.randn(4, 9, VOCAB, generator=torch.Generator().manual_seed(1)).mul_(3).requires_grad_()
    logits64 = logits.detach().double().requires_grad_()
    logp64 = reference.logits_logprob(logits64, labels)
    for reuse_logits in (False, True):
        logp = ck.logits_logprob(logits * 1.0, labels, reuse_logits=reuse_logits)
        compare("logits_logprob", logp, logp64, [logits], [logits64])
    loss = ck.logits_cwdpo_loss(logits, labels, *REFS, beta=BETA, cooling=COOLING).loss
    loss64 = reference.cwdpo_loss(*sequences(logp64, labels), *REFS64, BETA, COOLING)
    compare("logits_cwdpo_loss", loss, loss64, [logits], [logits64])


def differentiable_statistics() -> None:
    """Entropy and log-sum-exp with gradients, with and without kept tiles, and the sums that they come from."""
    hidden, head, labels = make_inputs((30,), VOCAB, DIM, bias=True)
    hidden64, head64 = as_float64(hidden, head)
    inputs, inputs64 = leaves(hidden, head), leaves(hidden64, head64)
    expected = reference.token_stats(hidden64, head64, labels)
    for name, kept_bytes in (("entropy", None), ("logsumexp", 0)):
        stats = ck.token_stats(hidden, head, labels, budget=ck.MemoryBudget(kept_bytes=kept_bytes))
        compare(name, getattr(stats, name), getattr(expected, name), inputs, inputs64)
    options = (head.bias, labels, head.scale, head.softcap, ck.IGNORE_INDEX, False, False, 0, 0)
    sums, *_ = ops.softmax_sums(hidden, head.weight, *options)
    target = reference.head_logits(hidden64, head64).gather(1, labels.clamp(0)[:, None])[:, 0]
    check("softmax_sums", sums[0], target.where(labels != ck.IGNORE_INDEX, 0.0))


def statistics() -> None:
    """Ops without gradients."""
    hidden, head, labels = make_inputs((30,), VOCAB, DIM)
    other_hidden, other_head, _ = make_inputs((30,), VOCAB, 40, seed=1)
    with torch.no_grad():
        sides64 = (*as_float64(hidden, head), *as_float64(other_hidden, other_head))
        fields = ck.token_stats(hidden, head, labels)._asdict()
        expected = reference.token_stats(*sides64[:2], labels)._asdict()
        fields |= ck.token_divergence(hidden, head, other_hidden, other_head)._asdict()
        expected |= reference.token_divergence(*sides64)._asdict()
        fields["cooling_weight"] = ck.cooling_weight(fields["logp"], ck.Cooling(-4.0, 2.0))
        expected["cooling_weight"] = torch.sigmoid((expected["logp"] + 4.0) / 2.0)
    for name, field in fields.items():
        check(name, field, expected[name])


def run_every_op() -> int:
    """Check all ops and return their number. Exits if one of them was not run."""
    with UsedOps() as used:
        linear_ops()
        logits_ops()
        differentiable_statistics()
        statistics()
    registered = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith(PREFIX)}
    if unused := registered - used.names:
        sys.exit(f"smoke: expected every op to run, got none of {', '.join(sorted(unused))}")
    return len(registered)


def main() -> None:
    folder = Path(ck.__file__).parent
    if "site-packages" not in folder.parts:
        sys.exit(f"smoke: expected an installed package, got the one in {folder}")
    if ck.backend("cpu") != "csrc":
        sys.exit(f"smoke: expected the backend csrc on the CPU, got {ck.backend('cpu')}: {ck.missing_backend('cpu')}")
    print(f"{run_every_op()} ops agree with float64, backend csrc")


if __name__ == "__main__":
    main()
