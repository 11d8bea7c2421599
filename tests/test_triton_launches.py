"""Triton launches: bitwise reproducible, no device sync, CUDA graphs, and the same compiler options everywhere."""

import ast
from pathlib import Path

import pytest
import torch

import cwdpo_kernels as ck
from cwdpo_kernels import ops
from cwdpo_kernels.testing import leaves, make_inputs

pytest.importorskip("triton")
from cwdpo_kernels.triton import configs, linear_logprob, logits_logprob

TRITON_SOURCES = sorted((Path(ck.__file__).parent / "triton").glob("*.py"))
ON_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
DEVICE = "cuda" if ON_GPU else "cpu"


def kernels_and_launches() -> tuple[set[str], list[tuple[str, str, ast.Call]]]:
    """Names of all kernels (`file:name`), and every `kernel[grid](...)` as (file, kernel, call)."""
    kernels, launches = set(), []
    for path in TRITON_SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                kernels.add(f"{path.name}:{node.name}")
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launches.append((path.name, ast.unparse(node.func.value), node))
    return kernels, launches


def test_every_launch_passes_the_compiler_options():
    """Without them the default of `enable_fp_fusion`, and so our numbers, would depend on Triton's version."""
    kernels, launches = kernels_and_launches()
    assert {f"{file}:{kernel}" for file, kernel, _ in launches} == kernels
    for file, kernel, call in launches:
        unpacked = {ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None}
        assert "COMPILER_OPTIONS" in unpacked, f"{file}:{call.lineno}: {kernel} is launched without COMPILER_OPTIONS"


def step(hidden, head, labels, rows):
    refs = torch.full((2, 2), -9.0, device=hidden.device)
    cooling = ck.Cooling(drop_below=-8.0)
    out = ck.linear_cwdpo_loss(hidden, head, labels, *refs, beta=0.1, cooling=cooling, rows=rows)
    return out.loss.detach(), *torch.autograd.grad(out.loss, leaves(hidden, head))


def inputs(dtype=torch.bfloat16):
    with torch.device(DEVICE):
        hidden, head, labels = make_inputs((4, 50), 507, 128, dtype, bias=True)
    return hidden, head, labels, (labels.flatten() != -100).nonzero().squeeze(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_same_bits_every_time(dtype):
    arguments = inputs(dtype)
    with ops.forced(DEVICE, "triton"):
        first, second = step(*arguments), step(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_label_outside_the_vocabulary_gives_nan():
    """Labels on a GPU are not checked, because that would sync it. A wrong one gives NaN, not a plausible number.

    Calls the kernels below the ops, which refuse wrong labels on a CPU.
    """
    hidden, weight = torch.randn(3, 16, device=DEVICE), torch.randn(50, 16, device=DEVICE)
    labels = torch.tensor([3, 50, -7], device=DEVICE)
    logp, *_ = linear_logprob.linear_logprob(hidden, weight, None, labels, 1.0, None, -100, False, False, 0, 0)
    from_logits, *_ = logits_logprob.logits_logprob(hidden @ weight.T, labels, -100, False)
    assert logp.isnan().tolist() == [False, True, True]
    assert from_logits.isnan().tolist() == [False, True, True]


def test_a_row_is_for_hidden_sizes_up_to_its_own(monkeypatch):
    """A fast configuration at a large hidden size is not used for small ones, whose tiles spend less on products."""
    small, middle, large = (configs.TileConfig(size, 128, 64, 4, 3) for size in (32, 64, 128))
    rows = {("x", "half", configs.ANY_D): large, ("x", "half", 576): small, ("x", "half", 2048): middle}
    monkeypatch.setattr(configs, "TILES", rows | {("x", "tf32", 64): large, ("y", "half", 64): large})
    expected = {1: small, 576: small, 577: middle, 2048: middle, 2049: large, 16384: large}
    assert {dim: configs.row_for("x", "half", dim) for dim in expected} == expected


@pytest.mark.parametrize(("chip", "dim", "statistics", "block_v"), [
    ("sm_90", 4096, False, 256), ("sm_90", 4096, True, 256), ("sm_90", 576, False, 128), ("sm_90", 576, True, 64),
    ("sm_100", 4096, True, 128),
])  # fmt: skip
def test_rows_say_where_statistics_need_narrower_tiles(monkeypatch, chip, dim, statistics, block_v):
    monkeypatch.setattr(configs, "chip", lambda device: chip)
    hidden = torch.empty(4, dim, dtype=torch.bfloat16)
    assert configs.tile_config(hidden, None, statistics=statistics).block_v == block_v


def test_every_hidden_size_has_a_row():
    kinds = {(chip, kind) for chip, kind, _ in configs.TILES}
    assert {(chip, kind) for chip, kind, size in configs.TILES if size == configs.ANY_D} == kinds
    assert {kind for _, kind in kinds} == {"half", "tf32", "ieee"}


@needs_gpu
def test_offsets_beyond_32_bits():
    """The two rows of these logits are 3e9 entries apart."""
    storage = torch.zeros(3_000_000_064, dtype=torch.bfloat16, device=DEVICE)
    logits = storage.as_strided((2, 64), (3_000_000_000, 1))
    logits.copy_(torch.randn(2, 64))
    labels = torch.tensor([1, 2], device=DEVICE)
    expected = torch.log_softmax(logits.double(), 1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(ck.logits_logprob(logits, labels).double(), expected)


@needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_device_sync():
    arguments = inputs()
    step(*arguments)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_cuda_graph_gives_the_same_bits():
    arguments = inputs()
    expected = step(*arguments)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*arguments)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
