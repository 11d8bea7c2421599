"""Non-finite numbers, against float64 eager: a logit of -inf has probability 0 and gradient 0; a NaN stays visible."""

import numpy as np
import pytest
import torch

import cwdpo_kernels as ck
from cwdpo_kernels import reference
from cwdpo_kernels.testing import as_float64, check_budget, leaves, make_inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INF, NAN = float("inf"), float("nan")
PAYLOADS = [0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF]  # the bits of NaNs in float32
VOCAB, MASKED = 300, 200  # several tiles; all columns of the last one are masked


pytestmark = pytest.mark.usefixtures("maximum_drops_nan")


def masked_inputs(dtype=torch.float32, frozen=False, **options):
    """A head whose columns from MASKED on have a bias of -inf, and labels below them."""
    hidden, head, labels = make_inputs((12,), VOCAB, 33, dtype, bias=True, **options)
    with torch.no_grad():
        head.bias[MASKED:] = -INF
    labels = torch.where(labels >= 0, labels % MASKED, labels)
    if frozen:
        head = ck.Head(head.weight.detach(), head.bias.detach(), head.scale, head.softcap)
    return hidden, head, labels


def value_and_grads(function, hidden, head, labels):
    logp = function(hidden, head, labels)
    upstream = torch.linspace(0.5, 1.5, logp.numel()).to(logp.dtype)
    return logp.detach(), *torch.autograd.grad(logp, leaves(hidden, head), upstream)


SLOW_BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.slow)
SLOW_F64 = pytest.param(torch.float64, marks=pytest.mark.slow)
BUDGETS = [ck.MemoryBudget(), ck.MemoryBudget(workspace_bytes=1), ck.MemoryBudget(workspace_bytes=1, kept_bytes=0)]


@pytest.mark.parametrize("budget", BUDGETS, ids=["default", "kept", "recomputed"])
@pytest.mark.parametrize("options", [{}, {"scale": 0.5, "softcap": 5.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_columns(dtype, frozen, options, budget):
    hidden, head, labels = masked_inputs(dtype, frozen, **options)
    ours = value_and_grads(lambda *a: ck.linear_logprob(*a, budget=budget), hidden, head, labels)
    eager = value_and_grads(reference.linear_logprob, hidden, head, labels)
    truth = value_and_grads(reference.linear_logprob, *as_float64(hidden, head), labels)
    for name, o, e, t in zip(("logp", "hidden", "weight", "bias"), ours, eager, truth, strict=False):
        assert torch.isfinite(t).all()
        check_budget(name, o, e, t)
    for grad in ours[2:]:
        assert not grad[MASKED:].any()


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_masked_labels_and_masked_competitors(dtype, frozen):
    """A masked label: logp -inf and the other columns' softmax as gradient. Only masked competitors: 0 and 0."""
    hidden, head, labels = masked_inputs(dtype, frozen)
    labels[::3] = MASKED + 5
    ours = value_and_grads(ck.linear_logprob, hidden, head, labels)
    truth = value_and_grads(reference.linear_logprob, *as_float64(hidden, head), labels)
    assert (truth[0][::3] == -INF).all()
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for actual, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(actual.double(), expected, **tolerance)

    with torch.no_grad():
        head.bias[:] = -INF
        head.bias[7] = 1.0
    labels[:] = 7
    logp, *grads = value_and_grads(ck.linear_logprob, hidden, head, labels)
    assert torch.equal(logp, torch.zeros_like(logp))
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_nothing_but_masked_columns(frozen):
    hidden, head, labels = masked_inputs(frozen=frozen)
    with torch.no_grad():
        head.bias[:] = -INF
    for actual in value_and_grads(ck.linear_logprob, hidden, head, torch.full_like(labels, 3)):
        assert torch.isnan(actual).all()


@pytest.mark.parametrize("lowest", [-INF, torch.finfo(torch.float32).min, -1e30, -1e9])
def test_masked_columns_of_logits(lowest):
    logits = torch.randn(5, VOCAB)
    logits[:, MASKED:] = lowest
    logits[4, 8:] = lowest
    logits[4, :7] = lowest
    logits.requires_grad_()
    labels = torch.tensor([0, 5, MASKED + 3, -100, 7])
    exact = logits.detach().double().requires_grad_()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        logp = ck.logits_logprob(logits.to(dtype), labels)
        truth = reference.logits_logprob(exact.to(dtype).double(), labels)
        torch.testing.assert_close(logp.double(), truth, rtol=1e-6, atol=1e-6)
        grad, expected = torch.autograd.grad(logp.sum(), logits)[0], torch.autograd.grad(truth.sum(), exact)[0]
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(grad.double(), expected, rtol=tolerance, atol=tolerance)
        others = torch.arange(VOCAB) != labels[:, None]
        assert not grad[:, MASKED:][others[:, MASKED:]].any()


def test_masked_columns_in_statistics_and_divergences():
    hidden, head, labels = masked_inputs()
    labels[::3] = MASKED + 5
    hidden64, head64 = as_float64(hidden, head)
    for actual, expected in zip(
        ck.token_stats(hidden, head, labels), reference.token_stats(hidden64, head64, labels), strict=True
    ):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-5)
    other = make_inputs((12,), VOCAB, 20, seed=5)[:2]
    for p, q in (((hidden, head), (hidden * 1.1, head)), ((hidden, head), other), (other, (hidden, head))):
        ours = ck.token_divergence(*p, *q)
        truth = reference.token_divergence(*as_float64(*p), *as_float64(*q))
        for name, actual, expected in zip(("tv", "js", "kl"), ours, truth, strict=True):
            assert not torch.isnan(expected).any()
            torch.testing.assert_close(
                actual.double(), expected, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )


PLACES = ["hidden", "label's row", "competitor's row", "masked row", "bias"]


def broken(place, value, dtype, frozen=False):
    """`value` in one entry of the inputs."""
    hidden, head, labels = masked_inputs(dtype, frozen, labelled=1.0)
    tensor, index = {
        "hidden": (hidden, (5, 3)),
        "label's row": (head.weight, (int(labels[5]), 2)),
        "competitor's row": (head.weight, (MASKED - 1, 2)),
        "masked row": (head.weight, (VOCAB - 1, 2)),
        "bias": (head.bias, (4,)),
    }[place]
    with torch.no_grad():
        tensor[index] = value
    return hidden, head, labels


def same_nans(ours, truth):
    """NaN in the same places; elsewhere the same value."""
    for actual, expected in zip(ours, truth, strict=True):
        assert torch.equal(torch.isnan(actual), torch.isnan(expected)), (actual, expected)
        known = ~torch.isnan(expected)
        torch.testing.assert_close(actual.double()[known], expected.double()[known], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, SLOW_BF16, SLOW_F64], ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_broken_inputs_give_what_eager_gives(place, value, dtype, frozen):
    hidden, head, labels = broken(place, value, dtype, frozen)
    ours = value_and_grads(ck.linear_logprob, hidden, head, labels)
    truth = value_and_grads(reference.linear_logprob, *as_float64(hidden, head), labels)
    same_nans(ours[:1], truth[:1])
    if place != "masked row":  # 0 * inf: eager's gradient is NaN where ours may be 0
        for actual, expected in zip(ours[1:], truth[1:], strict=True):
            assert not (torch.isnan(expected) & ~torch.isnan(actual)).any()


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("place", ["hidden", "label's row", "competitor's row"])
def test_statistics_of_broken_inputs(place, value, exact_dtype):
    hidden, head, labels = broken(place, value, exact_dtype)
    hidden64, head64 = as_float64(hidden, head)
    stats, expected_stats = ck.token_stats(hidden, head, labels), reference.token_stats(hidden64, head64, labels)
    same_nans(stats[:3], expected_stats[:3])
    assert not stats.is_top1[torch.isnan(stats.logp)].any()
    other = make_inputs((12,), VOCAB, 20, exact_dtype, seed=5)[:2]
    for p, q in (((hidden, head), other), (other, (hidden, head))):
        ours = ck.token_divergence(*p, *q)
        truth = reference.token_divergence(*as_float64(*p), *as_float64(*q))
        for actual, expected in zip(ours, truth, strict=True):
            assert torch.equal(torch.isnan(actual), torch.isnan(expected))


@pytest.mark.parametrize("bits", PAYLOADS, ids=hex)
@pytest.mark.parametrize("place", PLACES)
def test_nan_of_any_payload(place, bits):
    value = torch.tensor(np.array([bits], np.uint32).view(np.int32)).view(torch.float32)[0]
    for frozen, dtype in (
        (False, torch.float32),
        (True, torch.float32),
        (False, torch.bfloat16),
        (True, torch.float64),
    ):
        hidden, head, labels = broken(place, value, dtype, frozen)
        ours = value_and_grads(ck.linear_logprob, hidden, head, labels)
        truth = reference.linear_logprob(*as_float64(hidden, head), labels)
        assert torch.equal(torch.isnan(ours[0]), torch.isnan(truth))
        for grad in ours[1:]:
            assert torch.isnan(grad).any()
    logits = torch.randn(3, VOCAB)
    logits[1, 9] = value
    logits.requires_grad_()
    for label in (9, 11):
        logp = ck.logits_logprob(logits, torch.full((3,), label))
        assert torch.isnan(logp).tolist() == [False, True, False]
        (grad,) = torch.autograd.grad(logp.sum(), logits)
        assert torch.isnan(grad).all(1).tolist() == [False, True, False]
        assert torch.isnan(grad).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_broken_logits_give_what_eager_gives(value):
    for label, column in ((9, 9), (9, 150), (MASKED + 1, 9)):
        logits = torch.randn(4, VOCAB, dtype=torch.float64)
        logits[:, MASKED:] = -INF
        logits[1, column] = value
        logits[2, :] = value
        logits.requires_grad_()
        labels = torch.full((4,), label)
        truth = reference.logits_logprob(logits, labels)
        (expected,) = torch.autograd.grad(truth.sum(), logits)
        for dtype in (torch.float32, torch.float64):
            logp = ck.logits_logprob(logits.to(dtype), labels)
            same_nans([logp], [truth])
            same_nans(torch.autograd.grad(logp.sum(), logits), [expected])


def test_finite_inputs_that_overflow():
    """Products beyond float32 become -inf (probability 0) or +inf (NaN, visible), as in eager float32."""
    hidden, head, labels = make_inputs((6,), VOCAB, 8, labelled=1.0)
    with torch.no_grad():
        hidden[:, 0] = 1e20
        head.weight[:, 0] = 0.0
        head.weight[100, 0] = -1e20
        hidden[3, 1], head.weight[:, 1] = 1e20, 0.0
    labels[:] = 3
    for frozen in (False, True):
        head = ck.Head(head.weight.detach().requires_grad_(not frozen))
        ours = value_and_grads(ck.linear_logprob, hidden, head, labels)
        eager = value_and_grads(reference.linear_logprob, hidden, head, labels)
        same_nans(ours[:1], eager[:1])
        assert torch.isfinite(ours[0]).all()
        assert torch.isfinite(ours[-1]).all()
    with torch.no_grad():
        head.weight[102, 0] = 1e20
    assert torch.isnan(ck.linear_logprob(hidden, head, labels)).all()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("rows", [False, True], ids=["gathered", "all_rows"])
@pytest.mark.parametrize("mode", ["hinge", "hard", "smoothed"])
def test_hidden_states_of_ignored_tokens_do_not_matter(mode, rows, value):
    hidden, head, labels = make_inputs((4, 5), 300, 12, bias=True)
    assert (labels == -100).any()
    negatives = ck.GentleNegatives(mode=mode, nll_floor=50.0)
    everything = torch.arange(20) if rows else None
    grads = []
    for fill in (0.0, value):
        with torch.no_grad():
            hidden[labels == -100] = fill
        out = ck.linear_constrained_sft_loss(hidden, head, labels, negatives=negatives, rows=everything)
        grads.append(torch.autograd.grad(out.loss, leaves(hidden, head)))
    for clean, actual in zip(*grads, strict=True):
        torch.testing.assert_close(actual, clean)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_tokens_without_an_upstream_gradient_do_not_matter(bias, softcap):
    hidden, head, labels = make_inputs((9,), 300, 12, bias=bias, softcap=softcap, labelled=1.0)
    with torch.no_grad():
        hidden[4] = NAN
    upstream = torch.ones(9)
    upstream[4] = 0
    logp = ck.linear_logprob(hidden, head, labels)
    grads = torch.autograd.grad(logp, leaves(hidden, head), upstream)
    assert torch.isnan(logp).sum() == 1
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_float16_gradients_do_not_overflow_on_the_way(frozen):
    """The direction scale * (W_y - mean W) is beyond float16; its product with 1 - p_y is not."""
    dim, scale = 4, 1000.0
    weight = torch.full((8, dim), -100.0)
    weight[0] = 100.0
    hidden = torch.full((3, dim), 1e-5, dtype=torch.float16).requires_grad_()
    head = ck.Head(weight.half().requires_grad_(not frozen), scale=scale)
    labels = torch.zeros(3, dtype=torch.long)
    (grad,) = torch.autograd.grad(ck.linear_logprob(hidden, head, labels).sum(), hidden)
    hidden64, head64 = as_float64(hidden, head)
    (truth,) = torch.autograd.grad(reference.linear_logprob(hidden64, head64, labels).sum(), hidden64)
    assert grad.dtype == torch.float16
    assert truth.abs().max() < 65504
    torch.testing.assert_close(grad.double(), truth, rtol=2e-3, atol=0)


@pytest.mark.parametrize("softcap", [1.2e-38, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_extreme_soft_caps(softcap, frozen):
    hidden, head, labels = make_inputs((9,), 300, 12, labelled=1.0)
    head = ck.Head(head.weight.detach().requires_grad_(not frozen), softcap=softcap)
    ours = value_and_grads(ck.linear_logprob, hidden, head, labels)
    truth = value_and_grads(reference.linear_logprob, *as_float64(hidden, head), labels)
    for actual, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [1e-46, 1e39, INF, NAN, 0.0, -1.0])
def test_soft_caps_that_cannot_be_computed_are_refused(softcap):
    hidden, head, labels = make_inputs((9,), 300, 12)
    head = ck.Head(head.weight, softcap=softcap)
    for call in (
        lambda: ck.linear_logprob(hidden, head, labels),
        lambda: ck.token_stats(hidden, head, labels),
        lambda: ck.token_divergence(hidden, head, hidden, head),
    ):
        with pytest.raises(ValueError, match=r"expected head(_p)?\.softcap to have value None or between 1.2e-38 and"):
            call()
    if 0 < softcap < INF:
        wide, labels = torch.randn(9, 12, dtype=torch.float64), torch.zeros(9, dtype=torch.long)
        head = ck.Head(torch.randn(300, 12, dtype=torch.float64), softcap=softcap)
        torch.testing.assert_close(ck.linear_logprob(wide, head, labels), reference.linear_logprob(wide, head, labels))
