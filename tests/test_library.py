"""The C++ backend as a library: built where there is a compiler, never missed silently, alike for any thread count."""

import ctypes
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import cwdpo_kernels as ck
from cwdpo_kernels import ops, reference
from cwdpo_kernels.ops import library
from cwdpo_kernels.testing import as_float64, confident_inputs, leaves, make_inputs, relative_error

ROOT = Path(__file__).parents[1]
needs_library = pytest.mark.skipif(library.load() is not None, reason="the C++ backend was not built")


def step(hidden, head, labels, budget=ck.MemoryBudget()):  # noqa: B008
    logp = ck.linear_logprob(hidden, head, labels, budget=budget)
    return logp.detach(), *torch.autograd.grad(logp.sum(), leaves(hidden, head))


def test_a_machine_with_a_compiler_has_it():
    if shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
        assert library.load() is None
        assert ck.backend("cpu") == "csrc"
    else:
        assert ck.backend("cpu") == "portable"


def test_without_the_library(monkeypatch, tmp_path):
    """Not built, or built and broken: portable is named, with the reason; asked for by name there is an error."""
    monkeypatch.setattr(library, "PATH", tmp_path / "libcwdpo_cpu.so")
    assert ck.backend("cpu") == "portable"
    assert "was not built: install a C++ compiler" in ck.missing_backend("cpu")
    with pytest.raises(RuntimeError, match="expected the backend csrc on cpu"), ops.forced("cpu", "csrc"):
        pass
    library.PATH.write_text("no library")
    with pytest.warns(RuntimeWarning, match="built but cannot be loaded"):
        assert ck.backend("cpu") == "portable"


def test_there_is_no_csrc_on_a_gpu():
    with pytest.raises(RuntimeError, match="expected the backend csrc on cuda, got none: CPU only"):
        ops.forced("cuda", "csrc").__enter__()


@needs_library
def test_the_library_is_what_runs():
    """Arguments that the public functions would refuse reach the C++ checks, in their own words."""
    hidden, weight, labels = torch.randn(3, 8), torch.randn(5, 8), torch.tensor([0, 5, -100])
    arguments = (1.0, None, -100, False, False, 0, 0)
    with pytest.raises(RuntimeError, match="linear_logprob: expected labels to have values below 5, got 5"):
        torch.ops.cwdpo.linear_logprob(hidden, weight, None, labels, *arguments)
    with pytest.raises(RuntimeError, match="expected weight to have size of dimension 1 8, got 7"):
        torch.ops.cwdpo.linear_logprob(hidden, weight[:, :7], None, labels, *arguments)
    saved = (torch.zeros(3), hidden, weight, None, torch.zeros(3, dtype=torch.int64), *[torch.zeros(3)] * 3)
    for kept, message in ((weight[:4], "size of dimension 0 5, got 4"), (weight.T.contiguous().T, "layout contiguous")):
        with pytest.raises(RuntimeError, match=f"expected kept to have {message}"):
            torch.ops.cwdpo.linear_logprob_backward_(*saved, kept, 1.0, None, -100, True, True, False, 0)
    logp, *_ = torch.ops.cwdpo.linear_logprob(hidden, weight[:0], None, torch.full((3,), -100), *arguments)
    assert (logp == 0).all()  # an empty vocabulary is no reason to die
    refs, offsets = (torch.zeros(1), torch.zeros(1)), torch.tensor([0, 1, 4])
    with pytest.raises(RuntimeError, match="expected cu_seqlens to have last value 3, got 4"):
        torch.ops.cwdpo.cwdpo_loss(torch.zeros(3), labels, None, offsets, *refs, 0.1, -3, 1, None, None, False, -100)
    with ops.forced("cpu", "portable"):
        assert ck.backend("cpu") == "portable"
    assert ck.backend("cpu") == "csrc"


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_threads(frozen, dtype):
    """The same bits from run to run at a fixed number of threads; within rounding between numbers of threads."""
    hidden, head, labels = make_inputs((300,), 3001, 65, dtype, bias=not frozen)
    head.weight.requires_grad_(not frozen)
    runs = {}
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        runs[threads], again = step(hidden, head, labels), step(hidden, head, labels)
        assert all(torch.equal(a, b) for a, b in zip(runs[threads], again, strict=True))
    for threads in (2, 7):
        for actual, expected in zip(runs[threads], runs[1], strict=True):
            assert relative_error(actual, expected) < (1e-6 if actual.dtype == torch.float32 else 1e-4)


@needs_library
@pytest.mark.parametrize("kept_bytes", [3001 * 300 * 2, 1 << 30, None], ids=["half", "all", "in_gradient"])
@pytest.mark.parametrize("workspace_bytes", [1, None], ids=["small_tiles", "tiles"])
@pytest.mark.parametrize("shape", [(300, 65), (60, 301), (1500, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_changes_no_bit(dtype, shape, workspace_bytes, kept_bytes):
    """More tokens than hidden dimensions, fewer, and several blocks of them."""
    tokens, dim = shape
    hidden, head, labels = make_inputs((tokens,), 3001, dim, dtype)
    kept = step(hidden, head, labels, ck.MemoryBudget(workspace_bytes, kept_bytes))
    recomputed = step(hidden, head, labels, ck.MemoryBudget(workspace_bytes, kept_bytes=0))
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


@pytest.mark.parametrize("name", ["portable", pytest.param("csrc", marks=needs_library)])
def test_tiles_lie_in_the_memory_of_the_gradient(name):
    """Forward takes it, and autograd hands it on without a copy."""
    hidden, head, labels = make_inputs((30,), 3001, 65)
    arguments = (head.bias, labels, 1.0, None, -100, False, False, 1)
    with ops.forced("cpu", name):
        logp, *_, kept = torch.ops.cwdpo.linear_logprob(hidden, head.weight, *arguments, None)
        tiles = kept.clone()
        logp.sum().backward()
        assert head.weight.grad.data_ptr() == kept.data_ptr()
        assert not torch.equal(tiles, kept)
        expected, *_ = torch.ops.cwdpo.linear_logprob(hidden, head.weight, *arguments, 0)
        assert torch.equal(torch.autograd.grad(expected.sum(), head.weight)[0], kept)


@needs_library
@pytest.mark.parametrize("kept_bytes", [3001 * 300 * 2, None], ids=["half", "all"])
def test_rows_without_a_gradient_are_left_out_of_kept_tiles(kept_bytes):
    """Kept tiles hold every labelled row: the rows that still count are picked from between those that do not."""
    hidden, head, labels = make_inputs((300,), 3001, 65, bias=True, scale=0.7, softcap=5.0)
    counts = (torch.arange(300) % 3 == 0).float()
    grads = []
    for budget in (ck.MemoryBudget(kept_bytes=kept_bytes), ck.MemoryBudget(kept_bytes=0)):
        logp = ck.linear_logprob(hidden, head, labels, budget=budget)
        grads.append(torch.autograd.grad((logp * counts).sum(), leaves(hidden, head)))
    hidden64, head64 = as_float64(hidden, head)
    logp = reference.linear_logprob(hidden64, head64, labels)
    expected = torch.autograd.grad((logp * counts).sum(), leaves(hidden64, head64))
    for found in grads:
        assert all(relative_error(a, b) < 2e-6 for a, b in zip(found, expected, strict=True))


@needs_library
def test_gradients_keep_the_layout_of_what_they_belong_to():
    """As the fakes promise, for a compiler that plans strides from them: transposed tensors straight into the ops."""
    hidden, weight, labels = torch.randn(8, 30).T, torch.randn(8, 50).T, torch.arange(30)
    labels[::3] = -100
    arguments = (hidden, weight, None, labels, 1.0, None, -100, False, False, 0, 0)
    torch.library.opcheck(torch.ops.cwdpo.linear_logprob.default, arguments)
    grads = []
    for layout in (lambda x: x, torch.Tensor.contiguous):
        leaves_ = [layout(x).detach().requires_grad_() for x in (hidden, weight)]
        logp, *_ = torch.ops.cwdpo.linear_logprob(*leaves_, *arguments[2:])
        logits = layout(torch.randn(50, 30, generator=torch.Generator().manual_seed(0)).T).requires_grad_()
        logp = logp.sum() + torch.ops.cwdpo.logits_logprob(logits, labels, -100, False)[0].sum()
        grads.append(torch.autograd.grad(logp, [*leaves_, logits]))
        assert [grad.stride() for grad in grads[-1]] == [x.stride() for x in (*leaves_, logits)]
    for transposed, plain in zip(*grads, strict=True):
        torch.testing.assert_close(transposed, plain)


PRODUCTS = ["torch.mm", "avx512", "avx512bf16"]  # in the order of gemm.h


@pytest.fixture(params=range(len(PRODUCTS)), ids=PRODUCTS)
def products(request):
    """What a head's products run on: each of the processor's instruction sets, and torch's products."""
    limit = ctypes.CDLL(str(library.PATH)).cwdpo_limit_gemm
    if limit(request.param) != request.param:
        limit(len(PRODUCTS) - 1)
        pytest.skip(f"this processor or compiler has no {PRODUCTS[request.param]}")
    yield PRODUCTS[request.param]
    limit(len(PRODUCTS) - 1)


# Blocks of 6 rows, panels of 64 columns, vectors, pairs: they end everywhere. Several tiles, blocks, parts of a sum.
SHAPES = [(1, 1, 1), (1, 2, 3), (5, 17, 2), (7, 507, 123), (65, 129, 64), (70, 400, 2048), (1100, 700, 33)]


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16(shape, products):
    """Log-probs and statistics as exact as in float32; gradients as far off as rounding them to bfloat16 explains."""
    tokens, vocab, dim = shape
    hidden, head, labels = make_inputs((tokens,), vocab, dim, torch.bfloat16, labelled=1.0)
    hidden64, head64 = as_float64(hidden, head)
    truth = reference.linear_logprob(hidden64, head64, labels)
    stats, expected_stats = ck.token_stats(hidden, head, labels), reference.token_stats(hidden64, head64, labels)
    for actual, expected in zip(stats, expected_stats, strict=True):
        assert relative_error(actual, expected) < 1e-6
    expected = torch.autograd.grad(truth.sum(), leaves(hidden64, head64))
    for budget in (ck.MemoryBudget(), ck.MemoryBudget(kept_bytes=0)):
        logp, *grads = step(hidden, head, labels, budget)
        assert relative_error(logp, truth) < 1e-6
        assert all(relative_error(a, b) < 2.5e-3 for a, b in zip(grads, expected, strict=True))
    head.weight.requires_grad_(False)
    logp, grad = step(hidden, head, labels)
    assert relative_error(logp, truth) < 1e-6
    assert relative_error(grad, expected[0]) < 3e-3  # rounded twice: once as the direction, once scaled


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_floats(shape, dtype, products):
    """As exact as float32 sums are; half-precision gradients are rounded once."""
    tokens, vocab, dim = shape
    hidden, head, labels = make_inputs((tokens,), vocab, dim, dtype, labelled=1.0)
    hidden64, head64 = as_float64(hidden, head)
    truth = reference.linear_logprob(hidden64, head64, labels)
    expected = torch.autograd.grad(truth.sum(), leaves(hidden64, head64))
    rounding = 2e-6 if dtype == torch.float32 else 4e-4
    for budget in (ck.MemoryBudget(), ck.MemoryBudget(kept_bytes=0)):
        logp, *grads = step(hidden, head, labels, budget)
        assert relative_error(logp, truth) < 1e-6
        assert all(relative_error(a, b) < rounding for a, b in zip(grads, expected, strict=True))
    head.weight.requires_grad_(False)
    logp, grad = step(hidden, head, labels)
    assert relative_error(logp, truth) < 1e-6
    assert relative_error(grad, expected[0]) < 2 * rounding


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_weights_of_any_layout(dtype, products):
    hidden, head, labels = make_inputs((40,), 300, 50, dtype)
    plain = step(hidden, head, labels)
    for weight in (head.weight.detach().T.contiguous().T, head.weight.detach().repeat(1, 2)[:, :50]):
        again = step(hidden.detach().T.contiguous().T.requires_grad_(), ck.Head(weight.requires_grad_()), labels)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@needs_library
@pytest.mark.parametrize("p_label", [0.9, 0.9999])
def test_confident_labels_keep_their_gradient(p_label, products):
    """Within 5 % of the error that rounding the exact gradient to bfloat16 makes: no operand's rounding is seen."""
    hidden, head, labels = confident_inputs(p_label, 64, 2000, 256, torch.bfloat16)
    hidden64, head64 = as_float64(hidden, head)
    exact = torch.autograd.grad(reference.linear_logprob(hidden64, head64, labels).sum(), leaves(hidden64, head64))
    _, *grads = step(hidden, head, labels)
    for actual, expected in zip(grads, exact, strict=True):
        assert relative_error(actual, expected) < 1.05 * relative_error(expected.bfloat16(), expected)


def test_installs_without_a_compiler(tmp_path, monkeypatch):
    """The wheel is made all the same, without the library."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", ".*", "build", "runs", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignored)
    monkeypatch.setenv("CC", "/bin/false")
    monkeypatch.setenv("CXX", "/bin/false")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    subprocess.run([*command, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("cwdpo_kernels-*-py3-none-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "cwdpo_kernels/ops/library.py" in names
    assert not [name for name in names if name.endswith(".so")]
