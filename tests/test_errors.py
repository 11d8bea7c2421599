"""Bad arguments raise one error that names the argument, what was expected and what it got."""

import re

import pytest
import torch

import cwdpo_kernels as ck

H, W, Y = torch.zeros(4, 6, 8), torch.zeros(11, 8), torch.zeros(4, 6, dtype=torch.long)
REF, COOL = torch.zeros(2), ck.Cooling()
SEQ = ck.SequenceLogprob(REF, REF, torch.ones(2, dtype=torch.long))


def dpo(hidden=H, head=W, labels=Y, ref_chosen=REF, ref_rejected=REF, **options):
    return ck.linear_cwdpo_loss(
        hidden, head, labels, ref_chosen, ref_rejected, **{"beta": 0.1, "cooling": COOL, **options}
    )


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
    (
        lambda: ck.Head.of(torch.nn.ReLU()),
        "Head.of: expected module to have attribute weight of type Tensor, got NoneType",
    ),
]


@pytest.mark.parametrize(("call", "message"), CASES, ids=[message for _, message in CASES])
def test_message(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_head_of_a_module():
    linear = torch.nn.Linear(8, 11)
    head = ck.Head.of(linear, scale=0.5)
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    assert ck.Head.of(torch.nn.Linear(8, 11, bias=False)).bias is None
