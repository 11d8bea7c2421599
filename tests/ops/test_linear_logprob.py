import itertools

import pytest
import torch

import cwdpo_kernels as ck
from cwdpo_kernels import reference
from cwdpo_kernels.testing import as_float64, check_budget, leaves, make_inputs, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Both have whole and partial tiles, in the interpreter too.
SHAPES = [(3, 33), pytest.param((5, 61), marks=pytest.mark.slow)]
HEADS = [
    pytest.param({}, id="plain"),
    pytest.param({"bias": True}, id="bias"),
    pytest.param({"bias": True, "scale": 0.5, "softcap": 5.0}, id="softcap"),
]
# Tiny workspaces, and tiles kept of a part of the vocabulary, reach every branch of the tiling.
BUDGETS = [
    pytest.param(ck.MemoryBudget(), id="default"),
    pytest.param(ck.MemoryBudget(workspace_bytes=1), id="kept_in_gradient"),
    pytest.param(ck.MemoryBudget(workspace_bytes=1, kept_bytes=200_000), id="kept"),
]


def freeze(head: ck.Head) -> ck.Head:
    return ck.Head(head.weight.detach(), None if head.bias is None else head.bias.detach(), head.scale, head.softcap)


def value_and_grads(function, hidden, head, labels, upstream):
    logp = function(hidden, head, labels)
    return logp, torch.autograd.grad(logp, leaves(hidden, head), upstream.to(logp.dtype))


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_error_budget(shape, dtype, options, budget, frozen):
    hidden, head, labels = make_inputs(shape, 507, 123, dtype, **options)
    head = freeze(head) if frozen else head
    upstream = torch.randn(labels.shape)
    upstream[1] = 0  # rows that backward skips

    ours = value_and_grads(lambda *a: ck.linear_logprob(*a, budget=budget), hidden, head, labels, upstream)
    eager = value_and_grads(reference.linear_logprob, hidden, head, labels, upstream)
    truth = value_and_grads(reference.linear_logprob, *as_float64(hidden, head), labels, upstream)

    check_budget("logp", ours[0], eager[0], truth[0])
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (ours[0] <= 0).all()
    for name, ours_g, eager_g, truth_g in zip(("hidden", "weight", "bias"), ours[1], eager[1], truth[1], strict=False):
        assert ours_g.dtype == dtype
        check_budget(f"grad_{name}", ours_g, eager_g, truth_g)


@pytest.mark.parametrize(
    ("tokens", "vocab", "dim"), [(1, 1, 1), (1, 507, 123), (3, 2, 5), (130, 129, 1), (200, 300, 7)]
)
def test_odd_sizes(tokens, vocab, dim, exact_dtype, close):
    hidden, head, labels = make_inputs((tokens,), vocab, dim, exact_dtype, bias=True, labelled=1.0)
    upstream = torch.randn(tokens)
    budget = ck.MemoryBudget(workspace_bytes=1)
    ours = value_and_grads(lambda *a: ck.linear_logprob(*a, budget=budget), hidden, head, labels, upstream)
    truth = value_and_grads(reference.linear_logprob, hidden, head, labels, upstream)
    for actual, expected in zip((ours[0], *ours[1]), (truth[0], *truth[1]), strict=True):
        close(actual, expected)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("spread", [1e2, 1e4])
def test_any_finite_logits(spread, frozen):
    """Logits up to +-spread, with targets at the very top and the very bottom, are exact and do not overflow."""
    vocab, dim = 507, 16
    weight = torch.zeros(vocab, dim)
    weight[:, 0] = torch.linspace(-spread, spread, vocab)
    hidden = torch.zeros(6, dim)
    hidden[:, 0] = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, 1.0])
    labels = torch.tensor([0, vocab - 1, 250, 0, vocab - 1, -100])
    hidden.requires_grad_()
    head = ck.Head(weight.requires_grad_(not frozen))
    upstream = torch.ones(6)

    ours = value_and_grads(ck.linear_logprob, hidden, head, labels, upstream)
    truth = value_and_grads(reference.linear_logprob, *as_float64(hidden, head), labels, upstream)
    assert truth[0].min() <= -spread
    for actual, expected in zip((ours[0], *ours[1]), (truth[0], *truth[1]), strict=True):
        assert relative_error(actual, expected) < 1e-6


def test_unlikely_targets_among_random_logits():
    hidden, head, labels = make_inputs((40,), 507, 123, logit_std=3000.0, labelled=1.0)
    ours = value_and_grads(ck.linear_logprob, hidden, head, labels, torch.ones(40))
    eager = value_and_grads(reference.linear_logprob, hidden, head, labels, torch.ones(40))
    truth = value_and_grads(reference.linear_logprob, *as_float64(hidden, head), labels, torch.ones(40))
    assert truth[0].min() < -1e4
    for name, o, e, t in zip("lhw", (ours[0], *ours[1]), (eager[0], *eager[1]), (truth[0], *truth[1]), strict=True):
        check_budget(name, o, e, t)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("shape", [(0,), (4,), (2, 0)])
def test_nothing_labeled(shape, frozen):
    hidden, head, labels = make_inputs(shape, 507, 123, labelled=0.0, bias=True)
    head = freeze(head) if frozen else head
    logp = ck.linear_logprob(hidden, head, labels)
    assert torch.equal(logp, torch.zeros(shape))
    for tensor, grad in zip(leaves(hidden, head), torch.autograd.grad(logp.sum(), leaves(hidden, head)), strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_layouts_and_label_dtypes(dtype):
    """Non-contiguous hidden and weight and int32 labels give the same bits as contiguous ones and int64 labels."""
    hidden, head, labels = make_inputs((6, 10), 50, 12)
    plain = value_and_grads(ck.linear_logprob, hidden, head, labels, torch.ones(6, 10))
    strided = hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    weight = head.weight.detach().T.contiguous().T.requires_grad_()
    assert not strided.is_contiguous()
    assert not weight.is_contiguous()
    other = value_and_grads(ck.linear_logprob, strided, ck.Head(weight), labels.to(dtype), torch.ones(6, 10))
    for actual, expected in zip((other[0], *other[1]), (plain[0], *plain[1]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_rows_change_no_result():
    hidden, head, labels = make_inputs((4, 9), 50, 12)
    rows = (labels.flatten() != -100).nonzero().squeeze(1)
    expected = ck.linear_logprob(hidden, head, labels)
    for chosen in (rows, rows.int()):
        assert torch.equal(ck.linear_logprob(hidden, head, labels, rows=chosen), expected)
    # With other rows beside it, a BLAS may sum a row's product in another order.
    everything = ck.linear_logprob(hidden, head, labels, rows=torch.arange(36))
    torch.testing.assert_close(everything, expected, rtol=1e-6, atol=1e-6)


def test_a_bare_weight_is_accepted_as_head():
    hidden, head, labels = make_inputs((7,), 50, 12)
    assert torch.equal(ck.linear_logprob(hidden, head.weight, labels), ck.linear_logprob(hidden, head, labels))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_any_subset_of_gradients(needs, exact_dtype, close):
    hidden, head, labels = make_inputs((9,), 50, 12, exact_dtype, bias=True, labelled=1.0)
    for tensor, need in zip((hidden, head.weight, head.bias), needs, strict=True):
        tensor.requires_grad_(need)
    logp = ck.linear_logprob(hidden, head, labels)
    assert logp.requires_grad == any(needs)
    if any(needs):
        truth = reference.linear_logprob(hidden, head, labels)
        wanted = leaves(hidden, head)
        for a, b in zip(torch.autograd.grad(logp.sum(), wanted), torch.autograd.grad(truth.sum(), wanted), strict=True):
            close(a, b)


@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_gradcheck(options, frozen):
    hidden, head, labels = make_inputs((5,), 11, 4, torch.float64, logit_std=1.0, **options)

    def function(hidden, weight, bias):
        return ck.linear_logprob(hidden, ck.Head(weight, bias, head.scale, head.softcap), labels)

    weight, bias = (head.weight, head.bias) if not frozen else (head.weight.detach(), freeze(head).bias)
    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", BUDGETS)
def test_repeated_backward(budget, dtype, backend):
    """Repeated backwards, of some gradients or all, give the same bits and do not change earlier gradients.

    Triton keeps exponentials in the inputs' dtype, so tiles recomputed later differ by their rounding.
    """
    hidden, head, labels = make_inputs((9,), 500, 12, dtype)
    wanted = leaves(hidden, head)
    graphs = [ck.linear_logprob(hidden, head, labels, budget=budget).sum() for _ in range(2)]

    def grads(graph: int, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(graphs[graph], of, retain_graph=True)

    part, first = grads(0, hidden), grads(0, *wanted)
    copies = [grad.clone() for grad in first]
    again = [grads(0, *wanted), (part[0], *grads(0, head.weight)), grads(1, *wanted)]
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))
    rounding = (1e-6 if dtype == torch.float32 else 4e-3) if backend == "triton" else 0.0
    for others in again:
        assert all(relative_error(a, b) <= rounding for a, b in zip(first, others, strict=True))


def test_checkpointed():
    """Checkpointing discards the first forward and what it saved."""
    hidden, head, labels = make_inputs((9,), 500, 12)
    budget = ck.MemoryBudget(workspace_bytes=1)

    def call(hidden: torch.Tensor) -> torch.Tensor:
        return ck.linear_logprob(hidden, head, labels, budget=budget).sum()

    checkpointed = torch.utils.checkpoint.checkpoint(call, hidden, use_reentrant=False)
    pairs = zip(*(torch.autograd.grad(x, leaves(hidden, head)) for x in (checkpointed, call(hidden))), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("budget", BUDGETS)
def test_ignored_tokens_with_huge_logits(budget):
    """Ignored tokens among `rows`, as in a compiled graph, do not affect the result, whatever their logits."""
    hidden, head, labels = make_inputs((40,), 500, 12, labelled=1.0)
    labels[::2] = -100
    wanted = leaves(hidden, head)
    factor = torch.where(labels == -100, 1e3, 1.0)[:, None]
    logp = ck.linear_logprob(hidden * factor, head, labels, rows=torch.arange(40), budget=budget)
    expected = reference.linear_logprob(hidden, head, labels)
    for actual, truth in zip(*(torch.autograd.grad(x.sum(), wanted) for x in (logp, expected)), strict=True):
        assert relative_error(actual, truth) < 1e-5


def test_a_batched_backward_overwrites_nothing():
    hidden, head, labels = make_inputs((5,), 300, 12, labelled=1.0)
    logp = ck.linear_logprob(hidden, head, labels, budget=ck.MemoryBudget(workspace_bytes=1))
    batched = torch.autograd.grad(logp, head.weight, torch.eye(5), is_grads_batched=True, retain_graph=True)[0]
    plain = [torch.autograd.grad(x, head.weight, retain_graph=True)[0] for x in logp]
    assert relative_error(batched, torch.stack(plain)) < 1e-6


def test_autocast_follows_torch():
    """Inputs are cast to autocast's dtype, logits are not rounded, gradients have the parameters' dtype."""
    hidden, head, labels = make_inputs((20,), 507, 123)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        inside = ck.linear_logprob(hidden, head, labels)
    rounded = ck.linear_logprob(hidden.bfloat16(), ck.Head(head.weight.bfloat16()), labels)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, rounded)
    with torch.autocast(hidden.device.type, torch.bfloat16):  # backward keeps its precision inside the region
        inside.sum().backward()
    expected = torch.autograd.grad(rounded.sum(), [hidden, head.weight])
    for actual, truth in zip((hidden.grad, head.weight.grad), expected, strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, truth)


def test_inference_mode_and_no_grad():
    hidden, head, labels = make_inputs((20,), 507, 123)
    expected = ck.linear_logprob(hidden, head, labels).detach()
    with torch.inference_mode():
        assert torch.equal(ck.linear_logprob(hidden, head, labels), expected)
    with torch.no_grad():
        assert torch.equal(ck.linear_logprob(hidden, head, labels), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("dead", "transposed"),
    [(slice(0, 0), False), (slice(20, 100), False), (slice(20, 100), True), (slice(0, 110), False)],
    ids=["none", "some", "some, columns", "all"],
)
def test_sparse_grad_changes_no_result(dead, dtype, transposed):
    hidden, head, labels = make_inputs((110,), 261, 123, dtype, bias=True)
    if transposed:
        head = ck.Head(head.weight.detach().T.contiguous().T.requires_grad_(), head.bias)
    upstream = torch.randn(110)
    upstream[dead] = 0

    def grads(sparse_grad, hidden=hidden, head=head):
        args = (hidden, head.weight, head.bias, labels, 0.7, None, -100, False, sparse_grad, 30_000, 0)
        logp, *_ = torch.ops.cwdpo.linear_logprob(*args)
        return torch.autograd.grad(logp, leaves(hidden, head), upstream.to(logp.dtype))

    # Both sum in their own order, so each is compared with float64 and not with the other.
    truths = grads(False, *as_float64(hidden, head))
    for name, actual, dense, truth in zip("hwb", grads(True), grads(False), truths, strict=True):
        check_budget(name, actual, dense, truth)


@pytest.mark.plain_tensors
@pytest.mark.parametrize("with_rows", [False, True], ids=["all_tokens", "rows"])
def test_a_compiled_graph_without_rows_skips_ignored_tokens(with_rows):
    """There they are among the op's tokens. Kernels that skip them are slower where there are none."""
    hidden, head, labels = make_inputs((8, 20), 300, 12)
    labels[:6] = -100
    rows = (labels.flatten() != -100).nonzero().squeeze(1) if with_rows else None
    found = []

    def record(graph: torch.fx.GraphModule, _):
        found.extend(node.kwargs["sparse_grad"] for node in graph.graph.nodes if "linear_logprob" in str(node.target))
        return graph.forward

    compiled = torch.compile(lambda *args: ck.linear_logprob(*args, rows=rows), backend=record, fullgraph=True)
    logp = compiled(hidden, head, labels)
    assert found == [not with_rows]
    actual = (logp, *torch.autograd.grad(logp.sum(), leaves(hidden, head)))
    expected = reference.linear_logprob(hidden, head, labels)
    truth = (expected, *torch.autograd.grad(expected.sum(), leaves(hidden, head)))
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(actual, truth, strict=True))


@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wanted_gradients_change_no_bit_of_the_log_probs(dtype, options):
    hidden, head, labels = make_inputs((4, 21), 507, 64, dtype, **options)
    with torch.no_grad():
        expected = ck.linear_logprob(hidden, head, labels)
    for wanted in (hidden, freeze(head)), (hidden, head), (hidden.detach(), head):
        assert torch.equal(ck.linear_logprob(*wanted, labels), expected)


def truncated_to_tf32(x):
    """float32 with the fraction cut off after 10 bits."""
    return (x.detach().float().view(torch.int32) & -0x2000).view(torch.float32).double()


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_tf32(frozen, allow_tf32):
    """Products in tf32 are as far off as those of truncated operands, or less where a load rounds them."""
    hidden, head, labels = make_inputs((60,), 300, 64)
    head = freeze(head) if frozen else head
    upstream = torch.randn(labels.shape)
    truth = value_and_grads(reference.linear_logprob, *as_float64(hidden, head), labels, upstream)
    operands = (truncated_to_tf32(x).requires_grad_(x.requires_grad) for x in (hidden, head.weight))
    truncated = value_and_grads(reference.linear_logprob, next(operands), ck.Head(next(operands)), labels, upstream)
    allow_tf32()
    ours = value_and_grads(ck.linear_logprob, hidden, head, labels, upstream)
    for actual, other, true in zip(
        (ours[0], *ours[1]), (truncated[0], *truncated[1]), (truth[0], *truth[1]), strict=True
    ):
        assert relative_error(actual, true) <= 2 * relative_error(other, true)
