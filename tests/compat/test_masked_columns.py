"""A vocabulary padded with columns of bias -inf: adapters give finite losses and the gradients of float64 eager."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from cwdpo_kernels.compat import cut_cross_entropy, liger, torch_nn

VOCAB, PADDED = 101, 90


@pytest.fixture
def inputs(backend):
    hidden, weight = torch.randn(8, 6, 16), torch.randn(VOCAB, 16)
    bias = torch.zeros(VOCAB)
    bias[PADDED:] = -torch.inf
    labels = torch.randint(PADDED, (8, 6))
    labels[:, 4:] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), labels


def check(loss, inputs, eager):
    """Loss and gradients equal those of `eager` in float64."""
    hidden, weight, bias, labels = inputs
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    truth = eager(*exact, labels)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(loss, [hidden, weight, bias])
    for grad, expected in zip(grads, torch.autograd.grad(truth, exact), strict=True):
        assert torch.isfinite(expected).all()
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-6)
    return grads


def mean_nll(hidden, weight, bias, labels):
    return cross_entropy(linear(hidden, weight, bias).flatten(0, 1), labels.flatten())


def test_torch(inputs):
    hidden, weight, bias, labels = inputs
    loss = torch_nn.linear_cross_entropy(hidden.flatten(0, 1), weight, labels.flatten(), linear_bias=bias)
    _, grad_weight, grad_bias = check(loss, inputs, mean_nll)
    assert not grad_weight[PADDED:].any()
    assert not grad_bias[PADDED:].any()


def test_torch_with_label_smoothing_and_broken_ignored_tokens(inputs):
    hidden, weight, _, labels = inputs
    bias = torch.zeros(VOCAB).requires_grad_()

    def eager(hidden, weight, bias, labels):
        used = labels != -100
        return cross_entropy(linear(hidden[used], weight, bias), labels[used], label_smoothing=0.2)

    with torch.no_grad():
        hidden[:, 5] = torch.nan
    flat = hidden.flatten(0, 1), weight, labels.flatten()
    loss = torch_nn.linear_cross_entropy(*flat, linear_bias=bias, label_smoothing=0.2)
    check(loss, (hidden, weight, bias, labels), eager)


def test_cut_cross_entropy(inputs):
    hidden, weight, bias, labels = inputs
    check(cut_cross_entropy.linear_cross_entropy(hidden, weight, labels, bias), inputs, mean_nll)


@pytest.mark.parametrize("loss_type", ["sigmoid", "apo_zero"])
def test_liger(inputs, loss_type):
    hidden, weight, bias, labels = inputs
    dpo = liger.LigerFusedLinearDPOLoss(loss_type=loss_type, use_ref_model=False, compute_nll_loss=True)
    loss, _ = dpo(weight, hidden, labels, bias)

    def eager(hidden, weight, bias, labels):
        logp = torch.log_softmax(linear(hidden, weight, bias), -1)
        used = labels != -100
        total = (logp.gather(-1, labels.clamp_min(0)[..., None])[..., 0] * used).sum(1)
        w, l = 0.1 * total.split(4)[0], 0.1 * total.split(4)[1]  # noqa: E741
        losses = {
            "sigmoid": -torch.nn.functional.logsigmoid(w - l),
            "apo_zero": torch.sigmoid(-w) + torch.sigmoid(l),
        }[loss_type]
        return losses.mean() - total[:4].sum() / used[:4].sum()

    check(loss, inputs, eager)
