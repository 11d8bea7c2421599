"""Our version of verl's linear_cross_entropy: values and gradients against float64, errors, and an actor's step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cwdpo_kernels.compat.verl import linear_cross_entropy
from cwdpo_kernels.testing import check_budget

DIM, VOCAB = 33, 507


def make(tokens: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)

    def leaf(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) * 0.5).to(dtype).requires_grad_()

    return leaf(*tokens, DIM), leaf(VOCAB, DIM), torch.randint(0, VOCAB, tokens, generator=generator)


def eager(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, reduction: str) -> tuple[Tensor, Tensor]:
    logp = (F.linear(hidden, weight).flatten(0, -2) / temperature).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp.gather(-1, labels.reshape(-1, 1))[:, 0]
    return {"none": chosen, "sum": chosen.sum(), "mean": chosen.mean()}[reduction], entropy


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("tokens", [(21,), (3, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(reduction, temperature, tokens, dtype):
    hidden, weight, labels = make(tokens, dtype)
    results = []
    for function, cast in ((linear_cross_entropy, dtype), (eager, dtype), (eager, torch.float64)):
        leaves = [x.detach().to(cast).requires_grad_() for x in (hidden, weight)]
        logp, entropy = function(*leaves, labels, temperature, reduction)
        upstream = torch.linspace(0.5, 2.0, logp.numel(), dtype=logp.dtype).view(logp.shape)
        results.append([logp, entropy, *torch.autograd.grad(logp, leaves, upstream)])
    assert [x.shape for x in results[0]] == [x.shape for x in results[2]]
    assert {x.dtype for x in results[0][:2]} == {torch.promote_types(dtype, torch.float32)}
    for name, *values in zip(("logp", "entropy", "hidden", "weight"), *results, strict=True):
        check_budget(name, *values)


@pytest.mark.parametrize("frozen", ["nothing", "weight", "hidden", "both", "no_grad"])
def test_frozen_inputs_get_no_gradient(frozen):
    hidden, weight, labels = make((5,), torch.float32)
    expected = eager(hidden, weight, labels, 1.0, "none")
    hidden.requires_grad_(frozen not in ("hidden", "both"))
    weight.requires_grad_(frozen not in ("weight", "both"))
    with torch.set_grad_enabled(frozen != "no_grad"):
        logp, entropy = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close((logp, entropy), expected)
    assert logp.requires_grad == entropy.requires_grad == (frozen not in ("both", "no_grad"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("coefficient", [0.01, 1.0])
def test_the_entropy_has_a_gradient(coefficient, dtype):
    """verl's `entropy_coeff`."""
    hidden, weight, labels = make((21,), dtype)
    results = []
    for function, cast in ((linear_cross_entropy, dtype), (eager, dtype), (eager, torch.float64)):
        leaves = [x.detach().to(cast).requires_grad_() for x in (hidden, weight)]
        logp, entropy = function(*leaves, labels, 0.7, "none")
        results.append(torch.autograd.grad(logp.mean() - coefficient * entropy.mean(), leaves))
    for name, *values in zip(("hidden", "weight"), *results, strict=True):
        check_budget(name, *values)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does so itself
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_without_graph_breaks(compiler):
    hidden, weight, labels = make((5,), torch.float32)

    def results(function):
        logp, entropy = function(hidden, weight, labels, 0.7)
        return logp, entropy, *torch.autograd.grad(logp.sum() - entropy.mean(), (hidden, weight))

    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=compiler)
    torch.testing.assert_close(results(compiled), results(linear_cross_entropy))


def ppo_loss(logp: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2) -> Tensor:
    ratio = (logp - old).exp()
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return (losses * mask).sum() / mask.sum()


def test_an_actors_step():
    """Call it like verl's actor: packed [1, N, D], labels rolled by one, old log-probs, loss on response tokens."""
    hidden, weight, tokens = make((1, 23), torch.float32)
    labels = torch.roll(tokens, shifts=-1, dims=-1)
    mask = torch.zeros(23).index_fill(0, torch.tensor([4, 5, 6, 15, 16, 17, 18]), 1.0)
    advantages = torch.linspace(-1.0, 1.0, 23)
    with torch.no_grad():
        old, _ = linear_cross_entropy(hidden + 0.02, weight, labels, 0.8, "none")
    results = []
    for function, dtype in ((linear_cross_entropy, torch.float32), (eager, torch.float32), (eager, torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        logp, entropy = function(*leaves, labels, 0.8, "none")
        loss = ppo_loss(logp.squeeze(0), old.to(dtype), advantages.to(dtype), mask.to(dtype))
        loss.backward()
        results.append([loss, (entropy.detach() * mask).sum() / mask.sum(), *(leaf.grad for leaf in leaves)])
    for name, *values in zip(("loss", "mean entropy", "hidden", "weight"), *results, strict=True):
        check_budget(name, *values)


def test_a_group_of_one_process_is_accepted():
    hidden, weight, labels = make((5,), torch.float32)
    alone = linear_cross_entropy(hidden, weight, labels, 1.0, "none", SimpleNamespace(size=lambda: 1))
    torch.testing.assert_close(alone, linear_cross_entropy(hidden, weight, labels), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": "none"}, ValueError, "expected temperature to have type float, got str"),
        ({"temperature": 0.0}, ValueError, "expected temperature to have a value > 0, got 0.0"),
        ({"reduction": "avg"}, ValueError, "expected reduction to have a value in none, mean, sum, got 'avg'"),
        ({"labels": torch.full((5,), -100)}, ValueError, r"expected labels to have values in \[0, 507\) .* got -100"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, ValueError, r"expected labels to have shape \[5\]"),
    ],
    ids=["order", "temperature", "reduction", "ignored", "labels"],
)
def test_errors_name_the_argument(change, error, message):
    hidden, weight, labels = make((5,), torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "labels": labels} | change
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)
