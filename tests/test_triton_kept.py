"""The tiles that forward keeps on a GPU: how many fit, where they lie, and what the gradients make of them."""

import itertools

import pytest
import torch

import cwdpo_kernels as ck
from cwdpo_kernels import ops, reference
from cwdpo_kernels.testing import as_float64, leaves, relative_error

pytest.importorskip("triton")
from cwdpo_kernels.triton import kept

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def chunks_of(rows, vocab, dim, block_v, workspace_bytes, storage="gradient"):
    """On meta tensors in bfloat16. `storage`: "gradient", or a number of bytes."""
    hidden = torch.empty(rows, dim, dtype=torch.bfloat16, device="meta")
    memory = torch.empty(vocab, dim, dtype=torch.bfloat16, device="meta")
    if storage != "gradient":
        memory = torch.empty(storage, dtype=torch.uint8, device="meta")
    return kept.KeptChunks(memory, hidden, vocab, block_v, None, workspace_bytes)


def share(chunks):
    return sum(tile.shape[1] for tile in chunks.views.values()) / chunks.vocab


@pytest.mark.parametrize(
    ("rows", "vocab", "dim", "block_v", "before", "now"),
    [
        (8192, 151936, 4096, 256, 0.436, 0.4987),  # as many entries as the gradient has: a share of 0.5
        (4096, 49280, 576, 128, 0.0, 0.1402),  # 0.1406
        (2048, 262208, 2560, 256, 0.9373, 1.0),
    ],
)
def test_nearly_all_that_fits_into_the_gradient_is_kept(rows, vocab, dim, block_v, before, now):
    """`before`: with anchors beside each tile, and chunks of an eighth of the memory."""
    found, possible = share(chunks_of(rows, vocab, dim, block_v, 0)), min(dim / rows, 1)
    assert found == pytest.approx(now, abs=1e-4)
    assert before <= found <= possible
    assert found > 0.997 * possible


def test_a_large_budget_does_not_make_chunks_smaller():
    exact = chunks_of(4096, 49280, 576, 128, 0, storage=4096 * 49280 * 2)
    ample = chunks_of(4096, 49280, 576, 128, 0, storage=8 << 30)
    assert share(exact) == share(ample) == 1
    assert exact.chunks == ample.chunks
    assert len(ample.chunks) == len(chunks_of(4096, 49280, 576, 128, 0, storage=0).chunks) == 2


@pytest.mark.parametrize("storage", ["gradient", 5_000, 100_003])
def test_no_gradient_is_written_over_a_chunk_that_is_still_needed(storage, monkeypatch):
    monkeypatch.setattr(kept, "MIN_COLUMNS", 64)
    kept.plan.cache_clear()
    sizes = itertools.product((1, 7, 92, 129), (1, 513, 3000), (1, 13, 93), (0, 1, 30_000))
    for rows, vocab, dim, workspace_bytes in sizes:
        chunks = chunks_of(rows, vocab, dim, 32, workspace_bytes, storage)
        assert [tile for tiles in chunks.chunks for tile in tiles] == list(range(-(-vocab // 32)))
        bytes_of = {start: tile.numel() * 2 for start, tile in chunks.views.items()}
        used = sorted((start, start + bytes_of[first]) for first, start in chunks._starts.items())
        everything = sorted([*used, *((a, b) for a, b in chunks._unused if a < b)])
        assert everything[0][0] == 0
        assert everything[-1][1] == chunks.bytes.numel()
        assert all(a[1] == b[0] for a, b in itertools.pairwise(everything))
        for tiles in chunks.chunks[: len(chunks.views)]:
            written = tiles.start * 32 * chunks.gradient_row_bytes
            assert chunks._starts[tiles.start] % 16 == 0
            assert chunks._starts[tiles.start] >= written
            if chunks.outlives_its_gradient(tiles):
                assert chunks._starts[tiles.start] >= written + chunks.width(tiles) * chunks.gradient_row_bytes
    kept.plan.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("step", [0.02, 1.0])
@pytest.mark.parametrize("kept_bytes", [None, 1 << 20], ids=["in_gradient", "all"])
def test_logits_that_rise_along_the_vocabulary(kept_bytes, step, dtype):
    """Every chunk has a higher anchor than those before it, so that all but the last one are brought to another.

    With a step of 1 the first ones underflow, labels among them: their entries of U are -sum_exp all the same.
    """
    vocab, dim = 1024, 64
    generator = torch.Generator().manual_seed(0)
    with torch.device(DEVICE):
        hidden = torch.randn(6, dim, generator=generator, device="cpu").to(DEVICE, dtype)
        hidden[:, 0] = 1.0
        weight = (0.1 * torch.randn(vocab, dim, generator=generator, device="cpu")).to(DEVICE, dtype)
        weight[:, 0] = torch.arange(vocab) * step
        labels = torch.tensor([0, 200, 500, 900, 1023, -100])
    hidden, head = hidden.requires_grad_(), ck.Head(weight.requires_grad_())
    with ops.forced(DEVICE, "triton"):
        budget = ck.MemoryBudget(workspace_bytes=1, kept_bytes=kept_bytes)
        logp = ck.linear_logprob(hidden, head, labels, budget=budget)
        ours = torch.autograd.grad(logp.sum(), leaves(hidden, head))
    hidden64, head64 = as_float64(hidden, head)
    truth = reference.linear_logprob(hidden64, head64, labels)
    exact = torch.autograd.grad(truth.sum(), leaves(hidden64, head64))
    # float32 rounds logits of a thousand nats by up to 6e-5 nats.
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    assert relative_error(logp, truth) < 1e-5
    for actual, expected in zip(ours, exact, strict=True):
        assert relative_error(actual, expected) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_gradients_of_a_flat_distribution(dtype):
    """Divided by the sum of exponentials, hidden states times the upstream gradient would be subnormal in float16."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 16, generator=generator, device="cpu").to(DEVICE, dtype).requires_grad_()
    weight = (0.01 * torch.randn(2000, 16, generator=generator, device="cpu")).to(DEVICE, dtype)
    head, labels = ck.Head(weight.requires_grad_()), torch.tensor([0, 1, 1999, 500], device=DEVICE)
    upstream = torch.full((4,), 1e-3, device=DEVICE)
    with ops.forced(DEVICE, "triton"):
        ours = torch.autograd.grad(ck.linear_logprob(hidden, head, labels), leaves(hidden, head), upstream)
    hidden64, head64 = as_float64(hidden, head)
    truth = reference.linear_logprob(hidden64, head64, labels)
    exact = torch.autograd.grad(truth, leaves(hidden64, head64), upstream.double())
    assert relative_error(ours[1], exact[1]) < 3e-3
