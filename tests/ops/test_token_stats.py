import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cwdpo_kernels as ck
from cwdpo_kernels import reference
from cwdpo_kernels.testing import as_float64, check_budget, confident_inputs, leaves, make_inputs, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Both have whole and partial tiles, in the interpreter too.
SHAPES = [(1, 33), pytest.param((5, 61), marks=pytest.mark.slow)]


FIELDS = ("logp", "entropy", "top1_prob", "logsumexp", "log_sum_sq_probs", "mean_logit")
DIFFERENTIABLE = ("logp", "entropy", "logsumexp")
BUDGETS = {
    "default": ck.MemoryBudget(), "smallest tiles": ck.MemoryBudget(1, 0),
    "some kept": ck.MemoryBudget(4 << 20, 1 << 12),
}  # fmt: skip
# With all dtypes and budgets, the interpreter takes minutes.
FAST = [
    (torch.float32, "default"), (torch.float32, "smallest tiles"), (torch.bfloat16, "default"),
    (torch.bfloat16, "some kept"), (torch.float16, "default"), *((torch.float64, name) for name in BUDGETS),
]  # fmt: skip
CASES = [
    pytest.param(dtype, budget, marks=[] if (dtype, name) in FAST else pytest.mark.slow, id=f"{dtype}-{name}")
    for dtype in DTYPES for name, budget in BUDGETS.items()
]  # fmt: skip
OPTIONS = [{}, {"bias": True, "scale": 0.5, "softcap": 5.0}]


def frozen(head):
    bias = None if head.bias is None else head.bias.detach()
    return dataclasses.replace(head, weight=head.weight.detach(), bias=bias)


class RecordedOps(TorchDispatchMode):
    """Context that records the names of the ops that run in it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def gradients(stats, inputs, fields=DIFFERENTIABLE, seed=1):
    """Gradients of a random combination of `fields`."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    total = 0.0
    for name in fields:
        values = getattr(stats, name)
        total = total + (values * torch.randn(values.shape, generator=generator).to(values.dtype)).sum()
    return torch.autograd.grad(total, inputs, retain_graph=True)


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "softcap"])
@pytest.mark.parametrize(("dtype", "budget"), CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_error_budget(shape, dtype, options, budget):
    hidden, head, labels = make_inputs(shape, 301, 123, dtype, **options)
    exact = as_float64(hidden, head)
    stats = [ck.token_stats(hidden, head, labels, budget=budget), reference.token_stats(hidden, head, labels)]
    stats.append(reference.token_stats(*exact, labels))
    for name in FIELDS:
        check_budget(name, *(getattr(each, name) for each in stats))
        assert getattr(stats[0], name).requires_grad == (name in DIFFERENTIABLE)
    assert torch.equal(stats[0].is_top1, stats[2].is_top1)
    torch.testing.assert_close(stats[0].logp, ck.linear_logprob(hidden, head, labels), rtol=1e-5, atol=1e-6)
    for fields in (DIFFERENTIABLE, ("entropy",)):
        inputs = [leaves(hidden, head), leaves(hidden, head), leaves(*exact)]
        found = [gradients(each, leaf, fields) for each, leaf in zip(stats[1:], inputs[1:], strict=True)]
        ours = gradients(ck.token_stats(hidden, head, labels, budget=budget), inputs[0], fields)
        for name, *grads in zip(("hidden", "weight", "bias"), ours, *found, strict=False):
            check_budget(f"{fields}: {name}", *grads)
        of_frozen = gradients(ck.token_stats(hidden, frozen(head), labels, budget=budget), [hidden], fields)
        check_budget(f"{fields}: hidden, frozen head", of_frozen[0], found[0][0], found[1][0])


@pytest.mark.parametrize("budget", [ck.MemoryBudget(), ck.MemoryBudget(1)], ids=["default", "smallest tiles"])
@pytest.mark.parametrize("options", [*OPTIONS, {"logit_std": 30.0}], ids=["plain", "softcap", "large logits"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_head_whose_entropy_is_only_reported(dtype, options, budget):
    """The gradient of logp needs no pass over the vocabulary in backward. All others are right, too."""
    hidden, head, labels = make_inputs((5, 3), 301, 123, dtype, **options)
    head, exact = frozen(head), as_float64(hidden, head)
    stats = ck.token_stats(hidden, head, labels, budget=budget, expect_entropy_grad=False)
    eager, truth = reference.token_stats(hidden, head, labels), reference.token_stats(*exact, labels)
    for name in FIELDS:
        check_budget(name, *(getattr(each, name) for each in (stats, eager, truth)))
    assert torch.equal(stats.is_top1, truth.is_top1)
    for fields in (("logp",), ("entropy",), ("logsumexp",), DIFFERENTIABLE):
        with RecordedOps() as recorded:
            (ours,) = gradients(stats, [hidden], fields)
        assert ("cwdpo::softmax_sums_backward" in recorded.names) == (fields != ("logp",))
        others = [gradients(each, [leaf], fields)[0] for each, leaf in ((eager, hidden), (truth, exact[0]))]
        check_budget(f"{fields}: hidden", ours, *others)


@pytest.mark.parametrize("p_label", [0.5, 0.999, 1 - 1e-6])
def test_confident_tokens_of_a_frozen_head(p_label):
    hidden, head, labels = confident_inputs(p_label, 32, 500, 64, torch.float32)
    exact = as_float64(hidden, head)
    ours = ck.token_stats(hidden, frozen(head), labels, expect_entropy_grad=False)
    truth = reference.token_stats(*exact, labels)
    for name in FIELDS:
        assert relative_error(getattr(ours, name), getattr(truth, name)) < 1e-5, name
    for name in DIFFERENTIABLE:
        (found,), (expected, *_) = gradients(ours, [hidden], [name]), gradients(truth, leaves(*exact), [name])
        assert relative_error(found, expected) < 1e-5, name


@pytest.mark.plain_tensors  # for torch.compile
def test_expect_entropy_grad_is_for_frozen_heads():
    """A trainable head, a compiled graph and a vocabulary of one entry give the same as without the option."""
    hidden, head, labels = make_inputs((12,), 130, 40)
    for head_, function in (
        (head, ck.token_stats),
        (frozen(head), torch.compile(ck.token_stats, backend="eager", fullgraph=True)),
        (ck.Head(torch.ones(1, 40)), ck.token_stats),
    ):
        inputs = [x for x in (hidden, head_.weight) if x.requires_grad]
        targets = labels if head_.vocab > 1 else labels * 0
        plain, other = (function(hidden, head_, targets, expect_entropy_grad=value) for value in (True, False))
        for grads in zip(gradients(plain, inputs), gradients(other, inputs), strict=True):
            assert torch.equal(*grads)
        assert all(torch.equal(*fields) for fields in zip(plain, other, strict=True))


@pytest.mark.parametrize("p_label", [0.5, 0.999, 1 - 1e-6])
def test_confident_tokens(p_label):
    """The entropy and its gradient keep their digits, however small they are."""
    hidden, head, labels = confident_inputs(p_label, 32, 500, 64, torch.float32)
    exact = as_float64(hidden, head)
    ours, truth = ck.token_stats(hidden, head, labels), reference.token_stats(*exact, labels)
    assert torch.equal(ours.is_top1, truth.is_top1)
    for name in FIELDS:
        assert relative_error(getattr(ours, name), getattr(truth, name)) < 1e-5, name
    for name in DIFFERENTIABLE:
        ours, truth = ck.token_stats(hidden, head, labels), reference.token_stats(*exact, labels)
        found, expected = (
            gradients(ours, leaves(hidden, head), [name]), gradients(truth, leaves(*exact), [name])
        )  # fmt: skip
        for actual, value in zip(found, expected, strict=True):
            assert relative_error(actual, value) < 1e-5, name


def test_flat_distributions():
    """Equal logits: the entropy is log V, the largest there is, so that its gradient is 0."""
    hidden, weight = torch.ones(3, 4, requires_grad=True), torch.full((507, 4), 0.25, requires_grad=True)
    stats = ck.token_stats(hidden, weight, torch.tensor([0, 506, 100]))
    torch.testing.assert_close(stats.entropy, torch.full((3,), math.log(507)))
    torch.testing.assert_close(stats.log_sum_sq_probs, torch.full((3,), -math.log(507)))
    for grad in torch.autograd.grad(stats.entropy.sum(), [hidden, weight]):
        assert grad.abs().max() < 1e-6


def test_rows_without_a_gradient_may_have_any_values():
    """Ignored tokens, and tokens whose upstream gradient is 0, never spoil the others."""
    hidden, head, labels = make_inputs((8,), 61, 20, labelled=1.0)
    hidden = hidden.detach().index_fill(0, torch.tensor([2, 5]), math.nan).requires_grad_()
    labels = labels.index_fill(0, torch.tensor([2]), ck.IGNORE_INDEX)
    upstream = torch.ones(8).index_fill(0, torch.tensor([5]), 0.0)
    stats = ck.token_stats(hidden, head, labels)
    assert torch.isnan(stats.entropy).nonzero().flatten().tolist() == [5]
    grads = torch.autograd.grad(stats.entropy.nan_to_num() @ upstream, [hidden, head.weight])
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert not grads[0][[2, 5]].any()


@pytest.mark.parametrize("op", ["token_stats", "linear_logprob"])
def test_rows_of_a_frozen_head_without_a_gradient_may_have_any_values(op):
    """An upstream gradient of 0 never becomes NaN, nor does one of NaN count for an ignored token among `rows`."""
    hidden, head, labels = make_inputs((8,), 61, 20, labelled=1.0)
    hidden = hidden.detach().index_fill(0, torch.tensor([2, 5]), math.nan).requires_grad_()
    labels = labels.index_fill(0, torch.tensor([2, 6]), ck.IGNORE_INDEX)
    upstream = torch.ones(8).index_fill(0, torch.tensor([5]), 0.0).index_fill(0, torch.tensor([2, 6]), math.nan)
    for rows in (None, torch.arange(8)):
        if op == "token_stats":
            logp = ck.token_stats(hidden, frozen(head), labels, rows=rows, expect_entropy_grad=False).logp
        else:
            logp = ck.linear_logprob(hidden, frozen(head), labels, rows=rows)
        (grad,) = torch.autograd.grad(logp, hidden, upstream)
        assert torch.isfinite(grad).all()
        assert grad.any(1).tolist() == [True, True, False, True, True, False, False, True]


@pytest.mark.parametrize("rise", [2.0, 20.0, 23.0])
def test_the_entropy_keeps_its_digits_where_the_largest_logit_comes_late(rise):
    """With many tiles in bfloat16, exponentials may lie at the anchor of earlier tiles. The sums may not."""
    generator = torch.Generator("cpu").manual_seed(0)
    logits = torch.randn(600, 1, generator=generator, device="cpu")
    logits[-3] += rise
    weight, labels = logits.to(torch.bfloat16).to(torch.get_default_device()), torch.zeros(40, dtype=torch.int64)
    hidden = torch.ones(40, 1, dtype=torch.bfloat16, requires_grad=True)
    stats = ck.token_stats(hidden, weight, labels, budget=ck.MemoryBudget(1), expect_entropy_grad=False)
    one_tile = ck.token_stats(hidden, weight, labels)
    truth = reference.token_stats(*as_float64(hidden, ck.Head(weight)), labels)
    for name in FIELDS:
        torch.testing.assert_close(getattr(stats, name).double(), getattr(truth, name), rtol=1e-6, atol=5e-7)
    for name in DIFFERENTIABLE:
        found, expected = (gradients(each, [hidden], [name])[0] for each in (stats, one_tile))
        torch.testing.assert_close(found, expected)


def test_two_backwards_and_repeatability():
    """Backward may run twice (the kept tiles are then recomputed), and equal inputs give equal bits."""
    hidden, head, labels = make_inputs((12,), 130, 40)
    first, again = (ck.token_stats(hidden, head, labels) for _ in range(2))
    for name in ck.TokenStats._fields:
        assert torch.equal(getattr(first, name), getattr(again, name))
    inputs = leaves(hidden, head)
    total = (first.entropy + first.logp).sum()
    once, twice = (torch.autograd.grad(total, inputs, retain_graph=True) for _ in range(2))
    other = torch.autograd.grad((again.entropy + again.logp).sum(), inputs)
    for a, b, c in zip(once, twice, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert torch.equal(a, c)


def test_gradcheck(exact_dtype):
    if exact_dtype != torch.float64:
        pytest.skip("needs float64")
    hidden, head, labels = make_inputs((5,), 19, 7, torch.float64, bias=True, scale=0.7, softcap=4.0)

    def function(hidden, weight, bias):
        stats = ck.token_stats(hidden, dataclasses.replace(head, weight=weight, bias=bias), labels)
        return stats.logp, stats.entropy, stats.logsumexp

    assert torch.autograd.gradcheck(function, leaves(hidden, head))


@pytest.mark.plain_tensors
def test_function_transforms():
    """torch.func.grad, and vmap over it."""
    hidden, head, labels = make_inputs((3, 6), 31, 8)
    weight = head.weight.detach()

    def total(hidden, labels):
        return ck.token_stats(hidden, weight, labels).entropy.sum()

    expected = torch.autograd.grad(total(hidden, labels), hidden)[0]
    torch.testing.assert_close(torch.func.grad(total)(hidden.detach(), labels), expected)
    expected = torch.stack([torch.func.grad(total)(each, labels[0]) for each in hidden.detach()])
    batched = torch.func.vmap(torch.func.grad(total), in_dims=(0, None))(hidden.detach(), labels[0])
    torch.testing.assert_close(batched, expected)


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
    assert [field.item() for field in single] == [0.0, 0.0, 1.0, True, 1.0, 0.0, 1.0]


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize(("low", "high"), [(-2e38, 2e38), (-1e38, 2e38), (-1e38, 7e8)])
def test_logits_whose_distance_overflows(low, high, budget, backend):
    """Fifty equal logits far above all others, in a late tile: the entropy is log 50."""
    logits = torch.full((20000,), low).index_fill(0, torch.arange(19000, 19050), high)
    hidden, weight = torch.ones(3, 1, requires_grad=True), logits[:, None].clone().requires_grad_()
    stats = ck.token_stats(hidden, weight, torch.tensor([19000, 0, 19049]), budget=budget)
    if backend == "triton" and high > 7.4e8:  # beyond its anchors: NaN, never a wrong number
        assert stats.entropy.isnan().all()
        assert stats.logp.isnan().all()
        return
    torch.testing.assert_close(stats.entropy, torch.full((3,), math.log(50)))
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(stats.entropy.sum(), [hidden, weight]))


def test_a_label_whose_competitors_have_no_probability_left():
    """The log-odds overflow: the gradients are 0."""
    hidden, weight = torch.ones(1, 1, requires_grad=True), torch.tensor([[3e38], [-3e38], [-3e38]], requires_grad=True)
    stats = ck.token_stats(hidden, weight, torch.tensor([0]))
    assert [field.item() for field in stats[:4]] == [0.0, 0.0, 1.0, True]
    for grad in torch.autograd.grad((stats.entropy + stats.logp).sum(), [hidden, weight]):
        assert not grad.any()


def test_saved_tensor_hooks_may_change_the_layout():
    hidden, head, labels = make_inputs((9,), 37, 8, bias=True)
    inputs = leaves(hidden, head)
    expected = gradients(ck.token_stats(hidden, head, labels), inputs)
    strided = lambda x: x.t().contiguous().t() if x.dim() == 2 and x.is_floating_point() else x.clone()  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(strided, lambda x: x):
        stats = ck.token_stats(hidden, head, labels)
    torch.testing.assert_close(gradients(stats, inputs), expected)
