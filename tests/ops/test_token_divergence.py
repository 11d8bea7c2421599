import math

import pytest
import torch

import cwdpo_kernels as ck
from cwdpo_kernels import reference
from cwdpo_kernels.testing import as_float64, check_budget, make_inputs


@pytest.mark.parametrize("workspace_bytes", [1, 4 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_within_the_error_budget(dtype, workspace_bytes):
    p = make_inputs((3, 50), 507, 123, dtype, bias=True, seed=1)[:2]
    q = make_inputs((3, 50), 507, 64, dtype, softcap=5.0, seed=2)[:2]
    ours = ck.token_divergence(*p, *q, budget=ck.MemoryBudget(workspace_bytes))
    eager = reference.token_divergence(*p, *q)
    truth = reference.token_divergence(*as_float64(*p), *as_float64(*q))
    for name, fields in zip(("tv", "js", "kl"), zip(ours, eager, truth, strict=True), strict=True):
        check_budget(name, *fields)
        assert not fields[0].requires_grad


def test_known_values():
    hidden, head, _ = make_inputs((9,), 50, 12)
    same = ck.token_divergence(hidden, head, hidden, head)
    assert torch.equal(same.tv, torch.zeros(9))
    assert torch.equal(same.kl, torch.zeros(9))
    assert same.js.max() < 1e-12
    apart = ck.token_divergence(
        torch.ones(1, 1), torch.tensor([[50.0], [-50.0]]), torch.ones(1, 1), torch.tensor([[-50.0], [50.0]])
    )
    torch.testing.assert_close(torch.cat(apart), torch.tensor([1.0, math.log(2), 100.0]))


def test_close_distributions_keep_their_digits():
    hidden, head, _ = make_inputs((9,), 500, 12)
    near = ck.Head(head.weight * (1 + 1e-3))
    ours = ck.token_divergence(hidden, head, hidden, near)
    truth = reference.token_divergence(
        hidden.double(), ck.Head(head.weight.double()), hidden.double(), ck.Head(near.weight.double())
    )
    torch.testing.assert_close(ours.kl.double(), truth.kl, rtol=1e-2, atol=0)
    torch.testing.assert_close(ours.js.double(), truth.js, rtol=1e-2, atol=0)
