"""softmax_sums against its definition in float64: whole heads, and parts of one whose labels lie elsewhere."""

import pytest
import torch
from torch import Tensor

from cwdpo_kernels.portable.softmax_sums import SUMS
from cwdpo_kernels.reference.linear_logprob import head_logits
from cwdpo_kernels.testing import as_float64, check_budget, leaves, make_inputs, relative_error

OPS = torch.ops.cwdpo
VOCAB, IGNORED = 299, -100
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
OPTIONS = [{}, {"bias": True, "scale": 0.5, "softcap": 5.0}]
NAMES, ALL = ("hidden", "weight", "bias"), slice(None)
PARTS = [(0, VOCAB), (0, 100), (100, 170), (170, VOCAB)]  # columns of the whole head


def part(head, start, stop):
    """Weight and bias of the columns [start, stop), and the head's scale and soft cap."""
    bias = None if head.bias is None else head.bias[start:stop]
    return head.weight[start:stop], bias, head.scale, head.softcap


def defined(logits: Tensor, labels: Tensor) -> Tensor:
    """The sums [6, N] by their definition."""
    inside = (labels >= 0) & (labels < logits.shape[1])
    column = labels.clamp(0, logits.shape[1] - 1)[:, None]
    is_label = (torch.arange(logits.shape[1]) == column) & inside[:, None]
    target = torch.where(inside, logits.gather(1, column)[:, 0], 0.0)
    others = logits.masked_fill(is_label, -torch.inf)
    max_logit = others.amax(1).clamp_min(torch.finfo(torch.float32).min)
    distance = others - max_logit[:, None]
    u = distance.exp()
    moment = torch.where(u > 0, u * distance, 0.0)
    sums = torch.stack([target, max_logit, u.sum(1), moment.sum(1), u.square().sum(1), logits.sum(1)])
    return sums.masked_fill(labels == IGNORED, 0)


def sums_of(hidden, head, labels, columns, partial=True):
    """The op's sums of some columns, for labels of the whole vocabulary."""
    weight, bias, scale, softcap = part(head, *columns)
    local = torch.where(labels == IGNORED, IGNORED, labels - columns[0])
    local = torch.where((local == IGNORED) & (labels != IGNORED), -1, local)
    sums, *_ = OPS.softmax_sums(hidden, weight, bias, local, scale, softcap, IGNORED, partial, False, 0, 0)
    return sums, local


def merged(parts: list[Tensor]) -> Tensor:
    """The sums of a head from those of its parts."""
    target, max_logit, sum_exp, moment, sum_sq, sum_logit = torch.stack(parts, 1)
    top = max_logit.amax(0)
    shift = (max_logit - top).clamp_min(-1e3)
    decay = shift.exp()
    moment = decay * (moment + shift * sum_exp)
    rest = (x.sum(0) for x in (decay * sum_exp, moment, decay.square() * sum_sq, sum_logit))
    return torch.stack([target.sum(0), top, *rest])


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_parts_and_of_the_whole(dtype, options):
    """Labels of other parts leave all entries as competitors and a target of 0. Sums of 2 and 3 parts add up."""
    with torch.no_grad():
        hidden, head, labels = make_inputs((35,), VOCAB, 61, dtype, **options)
        logits = head_logits(*as_float64(hidden, head))
        found = {}
        for columns in PARTS:
            found[columns], local = sums_of(hidden, head, labels, columns)
            truth = defined(logits[:, slice(*columns)], local)
            for name, actual, expected in zip(SUMS, found[columns], truth, strict=True):
                assert relative_error(actual, expected) < 1e-5, (columns, name)
        whole, _ = sums_of(hidden, head, labels, PARTS[0], partial=False)
        two, _ = sums_of(hidden, head, labels, (100, VOCAB))
        for parts in ([found[0, 100], two], [found[columns] for columns in PARTS[1:]]):
            for name, actual, expected in zip(SUMS, merged(parts), whole, strict=True):
                assert relative_error(actual, expected) < 1e-5, name


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_of_a_part(dtype, options):
    """Any factors, at a maximum above that of the part; some tokens have a gradient at the label or in the log only."""
    hidden, head, labels = make_inputs((35,), VOCAB, 61, dtype, **options)
    columns = (70, 250)
    with torch.no_grad():
        sums, local = sums_of(hidden, head, labels, columns)
    random = torch.Generator("cpu").manual_seed(1)
    grad_target, exp_factor, log_factor = torch.randn(3, 35, generator=random, device="cpu").to(labels.device)
    for values, zeroed in ((grad_target, slice(0, 20)), (exp_factor, slice(8, 30)), (log_factor, slice(16, 35))):
        values[zeroed] = 0
    max_logit = sums[1] + 0.3

    def eager(hidden, head):
        logits = head_logits(hidden, head)[:, slice(*columns)]
        distance = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)) - max_logit[:, None]
        grad = distance.exp() * (exp_factor[:, None] + log_factor[:, None] * distance)
        is_label = torch.arange(logits.shape[1]) == local[:, None]
        grad = torch.where(is_label, grad_target[:, None], grad).masked_fill((local == IGNORED)[:, None], 0)
        return torch.autograd.grad(logits, leaves(hidden, head), grad.to(logits.dtype))

    weight, bias, scale, softcap = part(head, *columns)
    factors = [factor * scale for factor in (grad_target, exp_factor, log_factor)]
    arguments = (*factors, hidden, weight, bias, local, max_logit)
    options = (scale, softcap, IGNORED, True)
    with torch.no_grad():
        *_, kept = OPS.softmax_sums(hidden, weight, bias, local, *options, False, 0, None)
        results = [
            OPS.softmax_sums_backward(*arguments, hidden.new_empty(0), *options, True, True, bias is not None, 0)
        ]
        grad_hidden, grad_bias = OPS.softmax_sums_backward_(*arguments, kept, *options, True, bias is not None, 0)
        results.append((grad_hidden, kept, grad_bias))
    found, truth = eager(hidden, head), eager(*as_float64(hidden, head))
    for ours in results:
        for name, rows, *grads in zip(NAMES, (ALL, slice(*columns), slice(*columns)), ours, found, truth, strict=False):
            check_budget(name, grads[0], *(x[rows] for x in grads[1:]))


def test_edges():
    """No competitors, competitors at -inf, logits beyond every exponential, and what is not finite."""
    weight = torch.tensor([[0.0], [-torch.inf], [-torch.inf]])
    lowest = torch.finfo(torch.float32).min
    one = torch.ones(2, 1)
    labels = torch.tensor([0, IGNORED])
    for rows in (1, 3):
        sums, *_ = OPS.softmax_sums(one, weight[:rows], None, labels, 1.0, None, IGNORED, False, False, 0, 0)
        logit_sum = 0.0 if rows == 1 else -torch.inf
        assert sums.tolist() == [[0, 0], [lowest, 0], [0, 0], [0, 0], [0, 0], [logit_sum, 0]]
    logits = torch.tensor([[2e4], [-3e4], [2e4 - 1]])
    sums, *_ = OPS.softmax_sums(one[:1], logits, None, torch.tensor([1]), 1.0, None, IGNORED, False, False, 0, 0)
    truth = defined(logits.T.double(), torch.tensor([1]))
    torch.testing.assert_close(sums.double(), truth, rtol=1e-3, atol=1e-3)
    for value in (torch.nan, torch.inf):
        broken = torch.tensor([[0.0], [value], [1.0]])
        sums, *_ = OPS.softmax_sums(one, broken, None, torch.tensor([0, 9]), 1.0, None, IGNORED, True, False, 0, 0)
        assert sums[2].isnan().all()
        assert sums[0].tolist() == [0, 0]
    empty, *_ = OPS.softmax_sums(one[:0], weight, None, labels[:0], 1.0, None, IGNORED, False, False, 0, 0)
    assert empty.shape == (len(SUMS), 0)


@pytest.mark.parametrize("kept_bytes", [600, 0, None])
def test_memory_for_kept_tiles_has_no_uninitialized_bytes(kept_bytes):
    hidden, head, labels = make_inputs((12,), 37, 8)
    arguments = (hidden.detach(), head.weight.detach(), None, labels, 1.0, None, IGNORED, False, False, 0, kept_bytes)
    kept = [OPS.softmax_sums(*arguments)[-1] for _ in range(2)]
    assert torch.equal(*kept)
    assert kept[0].shape == (head.weight.shape if kept_bytes is None else (kept_bytes,))
