"""The C++ backend: built if there is a compiler, reported if missing, equal within rounding for any thread count."""

import ctypes
import os
import runpy
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
from cwdpo_kernels.ops.checks import UNINITIALIZED
from cwdpo_kernels.testing import as_float64, check_budget, confident_inputs, leaves, make_inputs, relative_error

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
    """Not built, or built and broken: portable runs and the reason is given; asking for csrc by name is an error."""
    monkeypatch.setattr(library, "PATH", tmp_path / "libcwdpo_cpu.so")
    assert ck.backend("cpu") == "portable"
    assert "was not built: install a C++ compiler" in ck.missing_backend("cpu")
    with pytest.raises(RuntimeError, match="expected the backend csrc on cpu"), ops.forced("cpu", "csrc"):
        pass
    library.PATH.write_text("no library")
    with pytest.warns(RuntimeWarning, match="built but cannot be loaded"):
        assert ck.backend("cpu") == "portable"


def test_a_library_of_another_version(monkeypatch):
    """A library without the symbols that the package calls is reported like a broken one."""
    monkeypatch.setattr(library, "PATH", Path(torch.__file__).parent / "lib" / "libc10.so")
    with pytest.warns(RuntimeWarning, match="cannot be loaded .*cwdpo_register"):
        assert ck.backend("cpu") == "portable"


def test_there_is_no_csrc_on_a_gpu():
    with pytest.raises(RuntimeError, match="expected the backend csrc on cuda, got none: CPU only"):
        ops.forced("cuda", "csrc").__enter__()


@needs_library
def test_ops_run_the_library():
    """Direct calls of the ops skip the public functions' checks and meet those of the C++ code."""
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
    assert (logp == 0).all()  # an empty vocabulary does not crash
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
    """Bitwise equal between runs with the same number of threads; equal within rounding between numbers of threads."""
    hidden, head, labels = make_inputs((300,), 3001, 65, dtype, bias=not frozen)
    head.weight.requires_grad_(not frozen)
    runs = {}
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        runs[threads], again = step(hidden, head, labels), step(hidden, head, labels)
        assert all(torch.equal(a, b) for a, b in zip(runs[threads], again, strict=True))
    for threads in (2, 7):
        for actual, expected in zip(runs[threads], runs[1], strict=True):
            # In bfloat16, sums in another order may round an entry the other way.
            assert relative_error(actual, expected) < (1e-6 if actual.dtype == torch.float32 else 2**-9)


@needs_library
@pytest.mark.parametrize("kept_bytes", [3001 * 300 * 2, 1 << 30, None], ids=["half", "all", "in_gradient"])
@pytest.mark.parametrize("workspace_bytes", [1, None], ids=["small_tiles", "tiles"])
@pytest.mark.parametrize("shape", [(300, 65), (60, 301), (1500, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_tiles_change_no_bit(dtype, shape, workspace_bytes, kept_bytes):
    """With more tokens than hidden dimensions, with fewer, and with several blocks of tokens."""
    tokens, dim = shape
    hidden, head, labels = make_inputs((tokens,), 3001, dim, dtype)
    kept = step(hidden, head, labels, ck.MemoryBudget(workspace_bytes, kept_bytes))
    recomputed = step(hidden, head, labels, ck.MemoryBudget(workspace_bytes, kept_bytes=0))
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
@pytest.mark.parametrize("at", [0, 1500, 3000], ids=["first", "middle", "last"])
def test_kept_exponentials_follow_logits_that_are_far_apart(at, order, threads):
    """Over the vocabulary the logits rise or fall by 300 nats, so that what was kept has to be scaled."""
    torch.set_num_threads(threads)
    hidden, head, _ = make_inputs((70,), 3001, 96, torch.bfloat16, bias=True)
    with torch.no_grad():
        head.bias.copy_(order * torch.linspace(-150, 150, 3001))
    labels = (at + torch.arange(70) - 35).clamp(0, 3000)
    budget, recompute = ck.MemoryBudget(workspace_bytes=1), ck.MemoryBudget(workspace_bytes=1, kept_bytes=0)
    logp = reference.linear_logprob(hidden, head, labels)
    eager = logp, *torch.autograd.grad(logp.sum(), leaves(hidden, head))
    hidden64, head64 = as_float64(hidden, head)
    exact = reference.linear_logprob(hidden64, head64, labels)
    truth = exact, *torch.autograd.grad(exact.sum(), leaves(hidden64, head64))
    for found in (step(hidden, head, labels, budget), step(hidden, head, labels, recompute)):
        for name, *values in zip(("logp", "hidden", "weight", "bias"), found, eager, truth, strict=True):
            check_budget(name, *values)


@pytest.mark.parametrize("name", ["portable", pytest.param("csrc", marks=needs_library)])
def test_tiles_lie_in_the_memory_of_the_gradient(name):
    """Forward allocates the gradient and keeps tiles in it; autograd returns the same memory without a copy."""
    hidden, head, labels = make_inputs((30,), 3001, 65)
    arguments = (head.bias, labels, 1.0, None, -100, False, False, 1)
    with ops.forced("cpu", name):
        logp, *_, kept = torch.ops.cwdpo.linear_logprob(hidden, head.weight, *arguments, UNINITIALIZED)
        tiles = kept.clone()
        logp.sum().backward()
        assert head.weight.grad.data_ptr() == kept.data_ptr()
        assert not torch.equal(tiles, kept)
        for kept_bytes in (0, None):  # the latter allocates the same memory, but the result `kept` stays as it is
            expected, *_ = torch.ops.cwdpo.linear_logprob(hidden, head.weight, *arguments, kept_bytes)
            assert torch.equal(torch.autograd.grad(expected.sum(), head.weight)[0], kept)


@needs_library
@pytest.mark.parametrize("kept_bytes", [3001 * 300 * 2, None], ids=["half", "all"])
def test_rows_without_a_gradient_are_left_out_of_kept_tiles(kept_bytes):
    """Kept tiles hold every labeled row. Backward uses only the rows whose upstream gradient is not zero."""
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
def test_gradients_have_the_layout_of_their_inputs():
    """Transposed inputs get gradients with the strides that the fakes report, because torch.compile relies on them."""
    hidden, weight, labels = torch.randn(8, 30).T, torch.randn(8, 50).T, torch.arange(30)
    labels[::3] = -100
    arguments = (hidden, weight, None, labels, 1.0, None, -100, False, False, 0, 0)
    torch.library.opcheck(torch.ops.cwdpo.linear_logprob.default, arguments)
    grads = []
    for layout in (lambda x: x, torch.Tensor.contiguous):
        leaves_ = [layout(x).detach().requires_grad_() for x in (hidden, weight)]
        logp, *_ = torch.ops.cwdpo.linear_logprob(*leaves_, *arguments[2:])
        logits = layout(
            torch.randn(50, 30, generator=torch.Generator(torch.get_default_device()).manual_seed(0)).T
        ).requires_grad_()
        logp = logp.sum() + torch.ops.cwdpo.logits_logprob(logits, labels, -100, False)[0].sum()
        grads.append(torch.autograd.grad(logp, [*leaves_, logits]))
        assert [grad.stride() for grad in grads[-1]] == [x.stride() for x in (*leaves_, logits)]
    for transposed, plain in zip(*grads, strict=True):
        torch.testing.assert_close(transposed, plain)


PRODUCTS = ["torch.mm", "avx512", "avx512bf16", "amx", "plain", "plain tiles"]  # in the order of gemm.h
UNLIMITED = PRODUCTS.index("amx")


@pytest.fixture(params=range(len(PRODUCTS)), ids=PRODUCTS)
def products(request):
    """The implementation of a head's matrix products: torch.mm, ours for an instruction set, or ours in plain C++."""
    limit = ctypes.CDLL(str(library.PATH)).cwdpo_limit_gemm
    if limit(request.param) != request.param:
        limit(UNLIMITED)
        pytest.skip(f"this processor or compiler has no {PRODUCTS[request.param]}")
    yield PRODUCTS[request.param]
    limit(UNLIMITED)


# Sizes that are no multiples of 6-row blocks, 64-column panels, vectors or pairs; several tiles, blocks, partial sums.
SHAPES = [(1, 1, 1), (1, 2, 3), (5, 17, 2), (7, 507, 123), (65, 129, 64), (70, 400, 2048), (1100, 700, 33)]


@needs_library
def test_the_products_in_use_are_reported(products):
    details = ck.backend_details("cpu")
    assert details["backend"] == "csrc"
    own = {"torch.mm": (False, False), "avx512": (True, False)}.get(products, (True, True))
    assert tuple(details[dtype].startswith("own") for dtype in ("float32", "bfloat16")) == own
    assert details["bfloat16"].endswith("AMX") == (products == "amx")
    assert "not used" not in details or "amx_bf16" in Path("/proc/cpuinfo").read_text()
    assert ck.backend_details("meta") == {"backend": "portable"}


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16(shape, products):
    """Log-probs and statistics are as accurate as in float32; gradients are off by one rounding to bfloat16."""
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
    assert relative_error(grad, expected[0]) < 3e-3  # rounded twice: the direction, then its scaled value


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_floats(shape, dtype, products):
    """As accurate as float32 sums; half-precision gradients are rounded once."""
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
    """The error is within 5 % of that of rounding the exact gradient to bfloat16: no operand was rounded before."""
    hidden, head, labels = confident_inputs(p_label, 64, 2000, 256, torch.bfloat16)
    hidden64, head64 = as_float64(hidden, head)
    exact = torch.autograd.grad(reference.linear_logprob(hidden64, head64, labels).sum(), leaves(hidden64, head64))
    _, *grads = step(hidden, head, labels)
    for actual, expected in zip(grads, exact, strict=True):
        assert relative_error(actual, expected) < 1.05 * relative_error(expected.bfloat16(), expected)


@pytest.fixture(scope="module")
def wheel_without_library(tmp_path_factory):
    """The wheel as it is built on a machine whose compiler fails."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("*.so", "__pycache__", ".*", "build", "dist", "runs", "*.egg-info")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder]
    environment = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false"}
    subprocess.run([*command, folder / "source"], check=True, capture_output=True, env=environment)
    (wheel,) = folder.glob("cwdpo_kernels-*-py3-none-*.whl")
    return wheel


def test_installs_without_a_compiler(wheel_without_library):
    names = zipfile.ZipFile(wheel_without_library).namelist()
    assert "cwdpo_kernels/ops/library.py" in names
    assert not [name for name in names if name.endswith(".so")]


def test_make_wheel_refuses_what_is_built_without_a_compiler(wheel_without_library):
    require_library = runpy.run_path(str(ROOT / "tools" / "wheel.py"))["require_library"]
    message = (
        r"expected cwdpo_kernels-.*\.whl to contain cwdpo_kernels/libcwdpo_cpu.so, got none: install a C\+\+ compiler"
    )
    with pytest.raises(SystemExit, match=message):
        require_library(wheel_without_library)


def test_the_smoke_test_of_a_wheel_runs_every_op():
    """`make wheel`, which takes minutes, is not the first to notice a new op."""
    smoke = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "smoke.py"))
    assert smoke["run_every_op"]() > 0  # exits if an op was not run
