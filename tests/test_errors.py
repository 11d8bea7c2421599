"""Bad arguments raise one error that names the argument, what was expected and what it got."""

import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

import cwdpo_kernels as ck

H, W, Y = torch.zeros(4, 6, 8), torch.zeros(11, 8), torch.zeros(4, 6, dtype=torch.long)
REF, COOL = torch.zeros(2), ck.Cooling()
INF = float("inf")
ROWS = torch.arange(24)
SEQ = ck.SequenceLogprob(REF, REF, torch.ones(2, dtype=torch.long))


def dpo(hidden=H, head=W, labels=Y, ref_chosen=REF, ref_rejected=REF, **options):
    return ck.linear_cwdpo_loss(
        hidden, head, labels, ref_chosen, ref_rejected, **{"beta": 0.1, "cooling": COOL, **options}
    )


def logp(head=W, **options):
    return ck.linear_logprob(H, head, Y, **options)


CASES = [
    (
        lambda: ck.linear_logprob(H, torch.zeros(11, 7), Y),
        "linear_logprob: expected head.weight to have D 8 (as hidden), got 7",
    ),
    (lambda: ck.linear_logprob(H, torch.zeros(8), Y), "expected head.weight to have shape [V, D], got [8]"),
    (lambda: ck.linear_logprob(H, torch.zeros(0, 8), Y), "expected head.weight to have V >= 1, got 0"),
    (
        lambda: ck.linear_logprob(H, W.double(), Y),
        "head.weight to have dtype torch.float32 (as hidden), got torch.float64",
    ),
    (lambda: ck.linear_logprob(H, W.to("meta"), Y), "expected head.weight to have device cpu (as hidden), got meta"),
    (lambda: ck.linear_logprob(H, ck.Head(W, torch.zeros(3)), Y), "expected head.bias to have shape [11], got [3]"),
    (
        lambda: ck.linear_logprob(H, ck.Head(W, softcap=-1.0), Y),
        "head.softcap to have value None or between 1.2e-38 and 3.4e+38, got -1.0",
    ),
    (lambda: ck.linear_logprob(H, ck.Head(W, 3), Y), "linear_logprob: expected head.bias to have type Tensor, got int"),
    (lambda: ck.linear_logprob(H, "lm_head", Y), "expected head to have type Head or Tensor [V, D], got str"),
    (lambda: ck.linear_logprob(H.long(), W, Y), "hidden to have dtype torch.float32 or"),
    (lambda: ck.linear_logprob(H, W, Y.float()), "labels to have dtype torch.int64 or torch.int32, got torch.float32"),
    (lambda: ck.linear_logprob(H, W, Y[:3]), "expected labels to have shape [4, 6] (as hidden), got [3, 6]"),
    (lambda: ck.linear_logprob(H, W, Y + 11), "expected labels to have values in [0, 11) or -100, got 11"),
    (lambda: ck.linear_logprob(H, W, Y - 1), "expected labels to have values in [0, 11) or -100, got -1"),
    (lambda: ck.linear_logprob(H, W, Y.to("meta")), "expected labels to have device cpu (as hidden), got meta"),
    (lambda: ck.linear_logprob(H, W, Y, rows=torch.zeros(2)), "expected rows to have dtype"),
    (lambda: ck.linear_logprob([1.0], W, Y), "expected hidden to have type Tensor, got list"),
    (
        lambda: ck.logits_logprob(torch.zeros(4, 6, 11), Y[0]),
        "expected labels to have shape [4, 6] (as logits), got [6]",
    ),
    (lambda: ck.logits_logprob(torch.zeros(4, 6, 0), Y), "expected logits to have V >= 1, got 0"),
    (lambda: ck.token_divergence(H, W, H, torch.zeros(12, 8)), "expected head_q.weight to have V 11, got 12"),
    (lambda: ck.token_divergence(H, W, H[:2], W), "expected hidden_q to have leading shape [4, 6], got [2, 6]"),
    (lambda: ck.sequence_logprob(torch.zeros(4, 6), Y[0]), "expected labels to have shape [4, 6], got [6]"),
    (
        lambda: ck.sequence_logprob(torch.zeros(24), Y.flatten()),
        "labels to have shape [S, T], or [N] with cu_seqlens, got [24]",
    ),
    (
        lambda: ck.sequence_logprob(torch.zeros(24), Y.flatten(), torch.tensor([0, 25])),
        "cu_seqlens to have values 0 <= ... <= 24",
    ),
    (lambda: ck.sequence_logprob(torch.zeros(24), Y.flatten(), torch.tensor([0, 9, 5, 24])), "got [0, 9, 5, 24]"),
    (lambda: ck.sequence_logprob(torch.zeros(4, 6), Y, torch.tensor([0, 24])), "labels to have shape [N] (packed"),
    (lambda: ck.shift_labels(Y.float()), "shift_labels: expected labels to have dtype"),
    (
        lambda: dpo(H[:3], labels=Y[:3]),
        "labels to have number of sequences even (chosen first, rejected second), got 3",
    ),
    (lambda: dpo(ref_chosen=torch.zeros(3)), "expected ref_chosen to have shape [2] (one per pair), got [3]"),
    (lambda: dpo(ref_rejected=[0.0, 0.0]), "expected ref_rejected to have type Tensor, got list"),
    (lambda: dpo(ref_rejected=REF.to("meta")), "expected ref_rejected to have device cpu"),
    (lambda: dpo(beta=-0.1), "expected beta to have value > 0, got -0.1"),
    (lambda: dpo(cooling=0.5), "expected cooling to have type Cooling, got float"),
    (lambda: dpo(normalize="mean"), "expected normalize to have value 'sequence' or 'token', got 'mean'"),
    (
        lambda: ck.cwdpo_loss(SEQ, REF, REF, REF, beta=0.1, cooling=COOL),
        "rejected to have type SequenceLogprob, got Tensor",
    ),
    (
        lambda: ck.cwdpo_loss(SEQ, ck.SequenceLogprob(*(x[:1] for x in SEQ)), REF, REF, beta=0.1, cooling=COOL),
        "cwdpo_loss: expected rejected.total to have shape [2] (one per pair), got [1]",
    ),
    (
        lambda: ck.linear_constrained_sft_loss(H, W, Y, negatives=0.1),
        "negatives to have type GentleNegatives, got float",
    ),
    (
        lambda: ck.constrained_sft_loss(SEQ, SEQ, negatives=ck.GentleNegatives(mode="smoothed")),
        "expected rejected_smoothing to have type Tensor [P] (mode 'smoothed'), got NoneType",
    ),
    (lambda: ck.Cooling(temperature=-1.0), "Cooling: expected temperature to have value finite and > 0, got -1.0"),
    (lambda: ck.Cooling(temperature=0.0), "expected temperature to have value finite and > 0, got 0.0"),
    (lambda: ck.Cooling(logp_floor=float("nan")), "expected logp_floor to have value finite, got nan"),
    (lambda: ck.Cooling(constant=1.5), "expected constant to have value None or in [0, 1], got 1.5"),
    (
        lambda: ck.GentleNegatives(mode="harsh"),
        "expected mode to have value 'hinge' or 'hard' or 'smoothed', got 'harsh'",
    ),
    (lambda: ck.GentleNegatives(weight=-1.0), "expected weight to have value finite and >= 0, got -1.0"),
    (
        lambda: ck.MemoryBudget(workspace_bytes=0),
        "workspace_bytes to have value None or an integer in [1, 2^63), got 0",
    ),
    (lambda: dpo(beta=INF), "linear_cwdpo_loss: expected beta to have value at most 3.4e+38, got inf"),
    (lambda: dpo(beta=float("nan")), "expected beta to have value at most 3.4e+38, got nan"),
    (lambda: dpo(beta=1e-320), "expected beta to have value at least 1.2e-38, got 1e-320"),
    (lambda: ck.Cooling(temperature=1e-320), "expected temperature to have value finite and > 0, got 1e-320"),
    (lambda: ck.Cooling(drop_below=10**400), "expected drop_below to have value None or a number, got 1000"),
    (lambda: ck.GentleNegatives(nll_floor=1e39), "expected nll_floor to have value finite, got 1e+39"),
    (lambda: logp(budget=2**20), "linear_logprob: expected budget to have type MemoryBudget, got int"),
    (
        lambda: ck.token_stats(H, W, Y, budget=None),
        "token_stats: expected budget to have type MemoryBudget, got NoneType",
    ),
    (lambda: ck.token_divergence(H, W, H, W, budget=1), "expected budget to have type MemoryBudget, got int"),
    (lambda: ck.logits_logprob(H, Y, reuse_logits="no"), "expected reuse_logits to have type bool, got str"),
    (
        lambda: ck.token_stats(H, W, Y, expect_entropy_grad=None),
        "expected expect_entropy_grad to have type bool, got NoneType",
    ),
    (lambda: logp(W.to_sparse()), "expected head.weight to have layout dense, got torch.sparse_coo"),
    (lambda: ck.linear_logprob(H.to_sparse(), W, Y), "expected hidden to have layout dense, got torch.sparse_coo"),
    (lambda: logp(ck.Head(W, torch.zeros(11).to_sparse())), "expected head.bias to have layout dense, got"),
    (lambda: ck.linear_logprob(H, W, Y.to_sparse()), "expected labels to have layout dense, got torch.sparse_coo"),
    (
        lambda: ck.linear_logprob(torch.nested.nested_tensor(list(H), layout=torch.jagged), W, Y),
        "expected hidden to have layout dense, got nested",
    ),
    (
        lambda: ck.cwdpo_loss(SEQ, SEQ._replace(count=SEQ.count.to("meta")), REF, REF, beta=0.1, cooling=COOL),
        "cwdpo_loss: expected rejected.count to have device cpu",
    ),
    (
        lambda: ck.Head.of(torch.nn.ReLU()),
        "Head.of: expected module to have attribute weight of type Tensor, got NoneType",
    ),
]


@pytest.mark.parametrize(("call", "message"), CASES, ids=[message for _, message in CASES])
def test_message(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


OPTIONS = {
    "beta": lambda value: dpo(beta=value),
    "head.scale": lambda value: logp(ck.Head(W, scale=value)),
    "head.softcap": lambda value: logp(ck.Head(W, softcap=value)),
    "logp_floor": lambda value: ck.Cooling(logp_floor=value),
    "temperature": lambda value: ck.Cooling(temperature=value),
    "constant": lambda value: ck.Cooling(constant=value),
    "drop_below": lambda value: ck.Cooling(drop_below=value),
    "weight": lambda value: ck.GentleNegatives(weight=value),
    "nll_floor": lambda value: ck.GentleNegatives(nll_floor=value),
    "smoothing": lambda value: ck.GentleNegatives(smoothing=value),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    "value", [True, "0.5", [0.5], 1j, Decimal("0.5"), torch.tensor(0.5), torch.nn.Parameter(torch.ones(())), np.True_],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_an_option_is_a_number(name, value):
    """Not True, a likely mistake, and no tensor: it would get no gradient."""
    with pytest.raises(
        ValueError, match=rf"expected {re.escape(name)} to have type a number.*, got {type(value).__name__}"
    ):
        OPTIONS[name](value)
    for number in (1, 0.5, np.float32(0.5), np.float64(0.5), Fraction(1, 2)):
        if name != "smoothing" or number < 1:
            OPTIONS[name](number)


IGNORING = {
    "linear_logprob": lambda value: ck.linear_logprob(H, W, Y, ignore_index=value),
    "logits_logprob": lambda value: ck.logits_logprob(H, Y, ignore_index=value),
    "sequence_logprob": lambda value: ck.sequence_logprob(torch.zeros(4, 6), Y, ignore_index=value),
    "linear_sequence_logprob": lambda value: ck.linear_sequence_logprob(H, W, Y, rows=ROWS, ignore_index=value),
    "shift_labels": lambda value: ck.shift_labels(Y, ignore_index=value),
    "linear_cwdpo_loss": lambda value: dpo(ignore_index=value),
}


@pytest.mark.parametrize("op", IGNORING)
@pytest.mark.parametrize("value", [None, 0.5, True, "-100", 2**63, torch.tensor(0)], ids=str)
def test_ignore_index_is_an_integer(op, value):
    with pytest.raises(
        ValueError, match=rf"{op}: expected ignore_index to have value an integer in \[-2\^63, 2\^63\), got"
    ):
        IGNORING[op](value)
    IGNORING[op](np.int64(-7))


@pytest.mark.parametrize("op", IGNORING)
@pytest.mark.parametrize("value", [2**32 + 5, 2**31, -(2**31) - 1])
def test_ignore_index_fits_labels_of_32_bits(op, value, monkeypatch):
    """Torch compares int32 labels with its lower 32 bits, so that label 5 would be ignored for 2^32 + 5."""
    IGNORING[op](value)  # with int64 labels
    monkeypatch.setitem(globals(), "Y", Y.int())
    calls = {**IGNORING, "linear_cwdpo_loss": lambda value: dpo(labels=Y, ignore_index=value)}
    expected = rf"{op}: expected ignore_index to have value an integer in \[-2\^31, 2\^31\) \(labels are torch.int32\)"
    with pytest.raises(ValueError, match=f"{expected}, got {value}"):
        calls[op](value)
    calls[op](-(2**31))


def test_shapes_on_the_meta_device():
    """A dry run without memory, as torch's own functions allow."""
    hidden, weight, labels = H.to("meta").requires_grad_(), W.to("meta").requires_grad_(), Y.to("meta")
    out = ck.linear_cwdpo_loss(hidden, weight, labels, REF.to("meta"), REF.to("meta"), beta=0.1, cooling=COOL)
    out.loss.backward()
    assert (out.loss.shape, hidden.grad.shape, weight.grad.shape) == ((), H.shape, W.shape)
    assert ck.token_stats(hidden, weight, labels).entropy.shape == Y.shape
    with pytest.raises(ValueError, match=r"expected head.weight to have device meta \(as hidden\), got cpu"):
        ck.linear_logprob(hidden, W, labels)


def test_head_of_a_module():
    linear = torch.nn.Linear(8, 11)
    head = ck.Head.of(linear, scale=0.5)
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    assert ck.Head.of(torch.nn.Linear(8, 11, bias=False)).bias is None
