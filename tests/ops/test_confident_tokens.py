"""Confident tokens, which most tokens are after supervised fine-tuning: rounded logits lose their gradient."""

import pytest
import torch

import cwdpo_kernels as ck
from cwdpo_kernels import reference
from cwdpo_kernels.testing import as_float64, confident_inputs, leaves, relative_error

CONFIDENCE = [0.5, 0.9, 0.99, 0.999, 0.9999]
# Tensor cores truncate their float32 sums: at D 256 and products in half precision by up to 1.8e-5 (docs/notes.md).
HALF_PRECISION_ERROR = 2e-5 if torch.cuda.is_available() else 1e-5


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p_label", CONFIDENCE)
def test_half_precision_gradients(p_label, dtype, frozen):
    hidden, head, labels = confident_inputs(p_label, 64, 2000, 256, dtype)
    head.weight.requires_grad_(not frozen)
    hidden64, head64 = as_float64(hidden, head)
    truth = reference.linear_logprob(hidden64, head64, labels)
    assert abs(truth.exp().median().item() - p_label) < 0.1 * min(p_label, 1 - p_label) + 0.01 * (1 - p_label)

    logp = ck.linear_logprob(hidden, head, labels)
    assert relative_error(logp, truth) < HALF_PRECISION_ERROR
    # A loss scale, as in fp16 training: without it the gradient would be subnormal in fp16.
    scale = 1.0 / (1 - p_label)
    ours = torch.autograd.grad((logp * scale).sum(), leaves(hidden, head))
    exact = torch.autograd.grad((truth * scale).sum(), leaves(hidden64, head64))
    for actual, expected in zip(ours, exact, strict=True):
        assert relative_error(actual, expected) < 3e-3


@pytest.mark.parametrize("p_label", [1 - 1e-6, 1 - 1e-9])
def test_probabilities_that_float32_rounds_to_one(p_label):
    hidden, head, labels = confident_inputs(p_label, 16, 500, 64, torch.float32)
    hidden64, head64 = as_float64(hidden, head)
    truth = reference.linear_logprob(hidden64, head64, labels)
    logp = ck.linear_logprob(hidden, head, labels)
    assert relative_error(logp, truth) < 1e-5
    ours = torch.autograd.grad(logp.sum(), leaves(hidden, head))
    exact = torch.autograd.grad(truth.sum(), leaves(hidden64, head64))
    for actual, expected in zip(ours, exact, strict=True):
        assert relative_error(actual, expected) < 1e-5
