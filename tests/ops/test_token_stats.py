import math

import pytest
import torch

import cwdpo_kernels as ck
from cwdpo_kernels import reference
from cwdpo_kernels.testing import as_float64, check_budget, confident_inputs, make_inputs, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Both have whole and partial tiles, in the interpreter too.
SHAPES = [(3, 33), pytest.param((5, 61), marks=pytest.mark.slow)]


@pytest.mark.parametrize("workspace_bytes", [1, 4 << 20])
@pytest.mark.parametrize("options", [{}, {"bias": True, "scale": 0.5, "softcap": 5.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_error_budget(shape, dtype, options, workspace_bytes):
    hidden, head, labels = make_inputs(shape, 507, 123, dtype, **options)
    ours = ck.token_stats(hidden, head, labels, budget=ck.MemoryBudget(workspace_bytes))
    eager = reference.token_stats(hidden, head, labels)
    truth = reference.token_stats(*as_float64(hidden, head), labels)
    for name in ("logp", "entropy", "top1_prob"):
        check_budget(name, *(getattr(stats, name) for stats in (ours, eager, truth)))
        assert not getattr(ours, name).requires_grad
    assert torch.equal(ours.is_top1, truth.is_top1)
    torch.testing.assert_close(ours.logp, ck.linear_logprob(hidden, head, labels).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("p_label", [0.5, 0.999, 1 - 1e-6])
def test_confident_tokens(p_label):
    hidden, head, labels = confident_inputs(p_label, 32, 500, 64, torch.float32)
    ours, truth = ck.token_stats(hidden, head, labels), reference.token_stats(*as_float64(hidden, head), labels)
    assert relative_error(ours.entropy, truth.entropy) < 1e-4
    assert relative_error(ours.top1_prob, truth.top1_prob) < 1e-6
    assert torch.equal(ours.is_top1, truth.is_top1)


def test_known_values():
    """Uniform, certain and two-way distributions, a vocabulary of one, and ignored tokens."""
    weight = torch.zeros(8, 1)
    uniform = ck.token_stats(torch.ones(3, 1), weight, torch.tensor([0, 7, -100]))
    torch.testing.assert_close(uniform.entropy, torch.tensor([math.log(8), math.log(8), 0.0]))
    torch.testing.assert_close(uniform.top1_prob, torch.tensor([0.125, 0.125, 0.0]))
    weight = torch.tensor([[1e4], [-1e4]])
    certain = ck.token_stats(torch.ones(2, 1), weight, torch.tensor([0, 1]))
    assert torch.equal(certain.entropy, torch.zeros(2))
    assert torch.equal(certain.is_top1, torch.tensor([True, False]))
    torch.testing.assert_close(certain.logp, torch.tensor([0.0, -2e4]))
    single = ck.token_stats(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([0]))
    assert [field.item() for field in single] == [0.0, 0.0, 1.0, True]
