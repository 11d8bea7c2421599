"""Anchors that tiles of bfloat16 share: most are then not rescaled, and the results stay as accurate."""

import pytest
import torch

import cwdpo_kernels as ck
from cwdpo_kernels import ops, reference
from cwdpo_kernels.testing import as_float64, check_budget, leaves

pytest.importorskip("triton")
from cwdpo_kernels.triton.sweep import Sweep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, VOCAB, DIM = 40, 2500, 16


def inputs(dtype, spread=1.0):
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(ROWS, DIM, generator=generator, device=DEVICE).to(dtype)
    weight = (torch.randn(VOCAB, DIM, generator=generator, device=DEVICE) * spread).to(dtype)
    return hidden, weight, torch.randint(VOCAB, (ROWS,), generator=generator, device=DEVICE)


def swept(hidden, weight, labels, min_anchor):
    sweep = Sweep(hidden, weight, None, labels, 1.0, None, -100)
    sweep.run(range(sweep.tiles_v), min_anchor=min_anchor, out=hidden.new_empty(ROWS, VOCAB))
    return sweep.anchor_TN, sweep.sum_exp_TN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_only_tiles_of_bfloat16_keep_an_anchor_below_their_own(dtype):
    head = inputs(dtype)
    own, sums = swept(*head, torch.full((ROWS,), -(2.0**30), device=DEVICE))
    headroom = 40 if dtype == torch.bfloat16 else 0
    kept = []
    for below in (0, 30, 200):
        start = own.amin(0) - below
        anchors, others = swept(*head, start)
        assert torch.equal(anchors, torch.where(own <= start + headroom, start, own))
        torch.testing.assert_close(others * torch.exp2(anchors - own), sums, rtol=1e-5, atol=0)
        kept.append((anchors < own).any().item())
    assert kept == [headroom > 0, headroom > 0, False]


@pytest.mark.parametrize("spread", [1.0, 30.0], ids=["within headroom", "beyond"])
@pytest.mark.parametrize("kept_bytes", [0, None, 1 << 20], ids=["none kept", "in gradient", "all kept"])
@pytest.mark.parametrize("workspace_bytes", [None, 30_000])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_results_with_shared_anchors(frozen, workspace_bytes, kept_bytes, spread):
    """Several chunks, and a first wave of tiles that is computed twice if all are kept."""
    hidden, weight, labels = inputs(torch.bfloat16, spread)
    hidden.requires_grad_()
    head, budget = ck.Head(weight.requires_grad_(not frozen)), ck.MemoryBudget(workspace_bytes, kept_bytes)

    def step(function, hidden, head, **options):
        logp = function(hidden, head, labels, **options)
        return logp, *torch.autograd.grad(logp.sum(), leaves(hidden, head))

    with ops.forced(DEVICE, "triton"):
        actual = step(ck.linear_logprob, hidden, head, budget=budget)
    eager, truth = (
        step(reference.linear_logprob, hidden, head),
        step(reference.linear_logprob, *as_float64(hidden, head)),
    )
    for name, ours, other, right in zip(("logp", "grad_hidden", "grad_weight"), actual, eager, truth, strict=False):
        check_budget(name, ours, other, right)
