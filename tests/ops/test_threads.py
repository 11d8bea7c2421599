"""The C++ backend on 1 to 64 threads: one parallel region a pass, and results that differ only by rounding."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cwdpo_kernels as ck
from cwdpo_kernels import reference
from cwdpo_kernels.ops.library import parallel_regions
from cwdpo_kernels.testing import as_float64, check_budget, leaves, make_inputs

HEAD = {"bias": True, "scale": 0.7, "softcap": 20.0}


@pytest.fixture(autouse=True)
def _only_csrc(backend):
    if backend != "csrc":
        pytest.skip("the threads of the C++ backend")


def step(hidden, head, labels):
    logp = ck.linear_logprob(hidden, head, labels)
    return logp, *torch.autograd.grad(logp.sum(), leaves(hidden, head))


def frozen(head):
    return ck.Head(head.weight.detach(), None if head.bias is None else head.bias.detach(), head.scale, head.softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("tokens", [20, 128])
def test_the_number_of_parallel_regions_does_not_depend_on_the_vocabulary(tokens, dtype, is_frozen):
    counts = []
    for vocab in (6000, 24000):
        hidden, head, labels = make_inputs((2, tokens), vocab, 96, dtype)
        head = frozen(head) if is_frozen else head
        before = parallel_regions()
        step(hidden, head, labels)
        counts.append(parallel_regions() - before)
    assert counts[0] == counts[1]
    assert 1 <= counts[0] <= 2  # one a pass


class LoopsOfTorch(TorchDispatchMode):
    """The calls of torch that run a loop on several threads: 32768 numbers (at::internal::GRAIN_SIZE) or more."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        copies = isinstance(result, torch.Tensor) and not function.is_view and "empty" not in str(function)
        if function.namespace == "aten" and copies and result.numel() >= 32768:
            self.names.append(function._schema.name)
        return result


@pytest.mark.parametrize("is_frozen", [False, True], ids=["trainable", "frozen"])
def test_a_step_runs_few_loops_of_torch(is_frozen):
    """Each one is a parallel region of its own."""
    hidden, head, labels = make_inputs((2, 400), 2000, 96, labelled=0.5)
    head = frozen(head) if is_frozen else head
    with LoopsOfTorch() as loops:
        step(hidden, head, labels)
    scale = ["aten::mul"] if is_frozen else []
    assert loops.names == ["aten::index_select", *scale, "aten::new_zeros", "aten::index_put_"]


def test_statistics_open_a_handful_of_parallel_regions():
    hidden, head, labels = make_inputs((2, 128), 12000, 96)
    before = parallel_regions()
    ck.token_stats(hidden, head, labels)
    assert 1 <= parallel_regions() - before <= 4


@pytest.mark.parametrize("threads", [1, 2, 7, 64])
@pytest.mark.parametrize("options", [{}, HEAD], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_any_number_of_threads_is_exact_and_repeatable(dtype, options, threads):
    """64 threads of a small vocabulary are split over tokens too, where a head is frozen."""
    hidden, head, labels = make_inputs((5, 61), 2001, 96, dtype, **options)
    torch.set_num_threads(threads)
    for head_ in (head, frozen(head)):
        ours, again = step(hidden, head_, labels), step(hidden, head_, labels)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
        logp = reference.linear_logprob(hidden, head_, labels)
        eager = logp, *torch.autograd.grad(logp.sum(), leaves(hidden, head_))
        hidden64, head64 = as_float64(hidden, head_)
        exact = reference.linear_logprob(hidden64, head64, labels)
        truth = exact, *torch.autograd.grad(exact.sum(), leaves(hidden64, head64))
        for name, *values in zip(("logp", "hidden", "weight", "bias"), ours, eager, truth, strict=False):
            check_budget(name, *values)
    stats, expected = ck.token_stats(hidden, head, labels), reference.token_stats(*as_float64(hidden, head), labels)
    torch.testing.assert_close(stats.entropy.double(), expected.entropy, rtol=1e-4, atol=1e-5)
    assert torch.equal(stats.is_top1, expected.is_top1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(300, 9000, 96), (2100, 1300, 600)], ids=str)
def test_more_shards_than_threads(dtype, shape):
    """Threads take shards as they become free: of the vocabulary while partial sums are small, else of tokens too."""
    hidden, head, labels = make_inputs(shape[:1], shape[1], shape[2], dtype, labelled=1.0)
    torch.set_num_threads(2)
    hidden64, head64 = as_float64(hidden, head)
    truth = step(hidden64, head64, labels)
    for head_, names in (head, ("logp", "hidden", "weight")), (frozen(head), ("logp", "hidden")):
        ours, again = step(hidden, head_, labels), step(hidden, head_, labels)
        torch.set_num_threads(1)
        one_thread = step(hidden, head_, labels)
        torch.set_num_threads(2)
        for name, *values, exact in zip(names, ours, again, one_thread, truth, strict=False):
            assert torch.equal(values[0], values[1])
            check_budget(name, values[0], values[2], exact)


@pytest.mark.parametrize("threads", [(2, 1), (1, 2), (2, 64)], ids=str)
@pytest.mark.parametrize("budget", [ck.MemoryBudget(), ck.MemoryBudget(kept_bytes=150_000)], ids=["gradient", "bytes"])
def test_threads_may_change_between_forward_and_backward(threads, budget):
    hidden, head, labels = make_inputs((2, 40), 2001, 96)
    torch.set_num_threads(threads[0])
    logp = ck.linear_logprob(hidden, head, labels, budget=budget)
    torch.set_num_threads(threads[1])
    ours = torch.autograd.grad(logp.sum(), leaves(hidden, head))
    hidden64, head64 = as_float64(hidden, head)
    truth = torch.autograd.grad(reference.linear_logprob(hidden64, head64, labels).sum(), leaves(hidden64, head64))
    for actual, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_logits_of_more_tokens_than_a_block(dtype, layout):
    """Every block of 1024 tokens reads the kept logits of a tile from the memory of the tile's own gradient."""
    hidden, head, labels = make_inputs((1100,), 300, 2200, dtype, labelled=1.0)
    if layout == "columns":
        head = ck.Head(head.weight.detach().T.contiguous().T.requires_grad_())
    ours = step(hidden, head, labels)
    hidden64, head64 = as_float64(hidden, head)
    exact = reference.linear_logprob(hidden64, head64, labels)
    truth = torch.autograd.grad(exact.sum(), leaves(hidden64, head64))
    eager_logp = reference.linear_logprob(hidden, head, labels)
    eager = torch.autograd.grad(eager_logp.sum(), leaves(hidden, head))
    for name, *values in zip(("hidden", "weight"), ours[1:], eager, truth, strict=True):
        check_budget(name, *values)
