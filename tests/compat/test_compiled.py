"""The adapters compile without graph breaks, and give the values and gradients of the uncompiled functions."""

from __future__ import annotations

import pytest
import torch

from cwdpo_kernels.compat import cut_cross_entropy, torch_nn
from cwdpo_kernels.compat.liger import LigerFusedLinearDPOLoss

PAIRS, LENGTH, DIM, VOCAB = 2, 5, 8, 30


def liger(hidden, weight, labels):
    loss = LigerFusedLinearDPOLoss(compute_nll_loss=True)
    return loss(weight, hidden, labels, None, hidden.detach() * 0.5, weight.detach())


FUNCTIONS = {
    "liger": liger,
    "cut-cross-entropy": lambda h, w, y: cut_cross_entropy.linear_cross_entropy(h, w, y, shift=1, softcap=5.0),
    "torch": lambda h, w, y: torch_nn.linear_cross_entropy(h.flatten(0, 1), w, y.flatten(), label_smoothing=0.1),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_without_graph_breaks(name, frozen):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * PAIRS, LENGTH, DIM, generator=generator).requires_grad_()
    weight = torch.randn(VOCAB, DIM, generator=generator).requires_grad_(not frozen)
    labels = torch.randint(VOCAB, (2 * PAIRS, LENGTH), generator=generator)
    labels[0, :3] = -100

    def results(function):
        output = function(hidden, weight, labels)
        loss, metrics = output if isinstance(output, tuple) else (output, ())
        return loss, *metrics, *torch.autograd.grad(loss, (hidden,) if frozen else (hidden, weight))

    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled), results(FUNCTIONS[name]))
