"""token_stats under torch.export, dynamic shapes, functional_call and DDP. More transforms: ops/test_derivatives.py."""

import pytest
import torch
from torch import nn

import cwdpo_kernels as ck
from cwdpo_kernels.testing import make_inputs


class Statistics(nn.Module):
    """A module whose output has gradients of every kind: of log-probs, entropies and log-sum-exps."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, hidden, labels):
        stats = ck.token_stats(hidden, self.weight, labels)
        return (stats.logp + 0.1 * stats.entropy + 0.01 * stats.logsumexp).sum()


@pytest.fixture
def module():
    return Statistics(make_inputs((4, 5), 37, 8)[1].weight)


def batch(tokens):
    hidden, _, labels = make_inputs((4, tokens), 37, 8)
    return hidden, labels


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_dynamic_shapes(module, strict):
    tokens = torch.export.Dim("tokens", min=2, max=64)
    example = tuple(x.detach() for x in batch(5))
    shapes = {"hidden": {1: tokens}, "labels": {1: tokens}}
    exported = torch.export.export(module, example, dynamic_shapes=shapes, strict=strict).module()
    for length in (5, 9):
        inputs = tuple(x.detach() for x in batch(length))
        torch.testing.assert_close(exported(*inputs), module(*inputs))


def test_compiled_with_dynamic_shapes(module):
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for length in (5, 9):
        hidden, labels = batch(length)
        losses = compiled(hidden, labels), module(hidden, labels)
        torch.testing.assert_close(*losses)
        grads = (torch.autograd.grad(loss, [hidden, module.weight]) for loss in losses)
        torch.testing.assert_close(*grads)


def test_functional_call(module):
    hidden, labels = batch(5)
    parameters = dict(module.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(module, parameters, (hidden.detach(), labels))

    expected = torch.autograd.grad(module(hidden, labels), module.weight)[0]
    torch.testing.assert_close(torch.func.grad(loss)(parameters)["weight"], expected)


def test_ddp_with_a_static_graph(module, tmp_path):
    hidden, labels = batch(5)
    expected = torch.autograd.grad(module(hidden, labels), module.weight)[0]

    def train() -> None:
        parallel = nn.parallel.DistributedDataParallel(module, static_graph=True)
        for _ in range(3):  # DDP records the graph in the first step and reuses it from the second on
            module.zero_grad()
            parallel(hidden.detach(), labels).backward()
            torch.testing.assert_close(module.weight.grad, expected)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        train()  # DDP must not outlive the group: its destructor would wait for gloo's thread, which may want the GIL
    finally:
        torch.distributed.destroy_process_group()
