"""Checks of public arguments, with one error template. None of them syncs with a device."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int64, torch.int32)
LARGEST = torch.finfo(torch.float32).max  # kernels take options as float32
SMALLEST = torch.finfo(torch.float32).tiny  # smaller ones lose digits, or become 0
AT_MOST, AT_LEAST = f"at most {LARGEST:.2g}", f"at least {SMALLEST:.2g}"
SFT_MODES = ("hinge", "hard", "smoothed")  # of constrained_sft_loss


def fail(op: str, arg: str, prop: str, expected: Any, actual: Any) -> NoReturn:
    """Raise the package's ValueError."""
    raise ValueError(f"{op}: expected {arg} to have {prop} {expected}, got {actual}")


def expect(condition: bool, op: str, arg: str, prop: str, expected: Any, actual: Any) -> None:
    """Raise the package's ValueError unless `condition` holds: the argument, what was expected, what it got."""
    if not condition:
        fail(op, arg, prop, expected, actual)


def check_dtype(op: str, arg: str, tensor: Tensor, expected: tuple[torch.dtype, ...]) -> None:
    """Check that this is a tensor with one element per index (not sparse or nested) and one of these dtypes."""
    expect(isinstance(tensor, Tensor), op, arg, "type", "Tensor", type(tensor).__name__)
    ok = tensor.layout == torch.strided and not tensor.is_nested
    expect(ok, op, arg, "layout", "dense", "nested" if tensor.is_nested else tensor.layout)
    expect(tensor.dtype in expected, op, arg, "dtype", " or ".join(map(str, expected)), tensor.dtype)


def is_number(value: Any) -> bool:
    """Whether this is a real number. A tensor is none: an option gets no gradient. Nor is True, a likely mistake."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_number(
    op: str, arg: str, value: Any, expected: str, low: float = -LARGEST, high: float = LARGEST, *,
    optional: bool = False, prop: str = "value",
) -> None:  # fmt: skip
    """Check that an option is a number in [low, high], or None if it is `optional`."""
    if value is None and optional:
        return
    ok = is_number(value)
    expect(ok, op, arg, "type", "a number or None" if optional else "a number", type(value).__name__)
    number = value if isinstance(value, (int, float)) else float(value)  # numpy warns of a limit beyond its dtype
    expect(low <= number <= high, op, arg, prop, expected, value)


def check_positive(op: str, arg: str, value: Any, prop: str = "value") -> None:
    """Check that an option is a number > 0 that float32 holds."""
    check_number(op, arg, value, AT_MOST, low=-math.inf, prop=prop)
    expect(value > 0, op, arg, prop, "> 0", value)
    expect(value >= SMALLEST, op, arg, prop, AT_LEAST, value)


def check_flag(op: str, arg: str, value: Any) -> None:
    expect(isinstance(value, bool), op, arg, "type", "bool", type(value).__name__)


def check_ignore_index(op: str, value: Any, labels: Tensor) -> None:
    """Check that this is an integer of the labels' dtype. Torch would compare int32 labels with its lower 32 bits."""
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    bits = 31 if labels.dtype == torch.int32 else 63
    if not (is_integer and -(2**bits) <= value < 2**bits):  # a compiler cannot take the repr of a symbolic value
        why = " (labels are torch.int32)" if bits == 31 else ""
        fail(op, "ignore_index", "value", f"an integer in [-2^{bits}, 2^{bits}){why}", repr(value))


def check_device(op: str, arg: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    expect(tensor.device == like.device, op, arg, "device", f"{like.device} (as {like_name})", tensor.device)


def check_head(op: str, hidden: Tensor, head: Any, hidden_name: str = "hidden", head_name: str = "head") -> None:
    """Check that `head` fits `hidden` [..., D]: shapes, dtype, device, a positive soft cap.

    One process's part of a head may be empty.
    """
    check_dtype(op, hidden_name, hidden, FLOAT_DTYPES)
    expect(hidden.dim() >= 1, op, hidden_name, "dimensions", ">= 1", hidden.dim())
    weight, bias = head.weight, head.bias
    check_dtype(op, f"{head_name}.weight", weight, FLOAT_DTYPES)
    expect(weight.dim() == 2, op, f"{head_name}.weight", "shape", "[V, D]", list(weight.shape))
    ok = weight.shape[0] >= 1 or head.shard is not None
    expect(ok, op, f"{head_name}.weight", "V", ">= 1", weight.shape[0])
    expect(hidden.shape[-1] >= 1, op, hidden_name, "D", ">= 1", hidden.shape[-1])
    expect(
        weight.shape[1] == hidden.shape[-1], op, f"{head_name}.weight", "D",
        f"{hidden.shape[-1]} (as {hidden_name})", weight.shape[1],
    )  # fmt: skip
    tensors = [("weight", weight)] if bias is None else [("weight", weight), ("bias", bias)]
    for name, tensor in tensors:
        arg = f"{head_name}.{name}"
        check_dtype(op, arg, tensor, FLOAT_DTYPES)
        expect(tensor.dtype == hidden.dtype, op, arg, "dtype", f"{hidden.dtype} (as {hidden_name})", tensor.dtype)
        check_device(op, arg, tensor, hidden, hidden_name)
    if bias is not None:
        ok = bias.shape == weight.shape[:1]
        expect(ok, op, f"{head_name}.bias", "shape", [weight.shape[0]], list(bias.shape))
    check_transform(op, head_name, head, hidden.dtype)


def check_transform(op: str, head_name: str, head: Any, dtype: torch.dtype) -> None:
    """Check that scale and soft cap are numbers that the dtype of the computation can hold."""
    limits = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    for name, value in (("scale", head.scale), ("softcap", head.softcap)):
        ok = is_number(value) or (name == "softcap" and value is None)
        expected = "a number (for a learnable scale, multiply hidden by it)" if name == "scale" else "a number or None"
        expect(ok, op, f"{head_name}.{name}", "type", expected, type(value).__name__)
    ok = abs(head.scale) <= limits.max
    expect(ok, op, f"{head_name}.scale", "value", f"finite and at most {limits.max:.2g}", head.scale)
    check_softcap(op, f"{head_name}.softcap", head.softcap, dtype)


def check_softcap(op: str, arg: str, softcap: float | None, dtype: torch.dtype) -> None:
    limits = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    ok = softcap is None or limits.tiny <= softcap <= limits.max
    expect(ok, op, arg, "value", f"None or between {limits.tiny:.2g} and {limits.max:.2g}", softcap)


def may_read(indices: Tensor) -> bool:
    """Whether values can be read without a sync: on a CPU, outside of compiled graphs, and not under vmap over them."""
    return indices.device.type == "cpu" and not torch.compiler.is_compiling() and not is_batched(indices)


def is_batched(tensor: Tensor) -> bool:
    """Whether `tensor` is a batch of vmap, possibly within another transform of torch.func."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def check_labels(op: str, labels: Tensor, like: Tensor, like_name: str, vocab: int | None, ignore_index: int) -> None:
    """Check that labels fit `like` [..., X]; their values only on the CPU, where reading them needs no device sync.

    vocab None: labels may have any value.
    """
    check_dtype(op, "labels", labels, INDEX_DTYPES)
    check_ignore_index(op, ignore_index, labels)
    expected = list(like.shape[:-1])
    ok = list(labels.shape) == expected
    expect(ok, op, "labels", "shape", f"{expected} (as {like_name})", list(labels.shape))
    check_device(op, "labels", labels, like, like_name)
    if vocab is not None and labels.numel() and may_read(labels):
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
        if wrong.any():
            value = labels[wrong][0].item()
            fail(op, "labels", "values", f"in [0, {vocab}) or {ignore_index}", value)


def check_rows(op: str, rows: Tensor, labels: Tensor) -> None:
    check_dtype(op, "rows", rows, INDEX_DTYPES)
    expect(rows.dim() == 1, op, "rows", "shape", "[M], indices of labeled tokens", list(rows.shape))
    check_device(op, "rows", rows, labels, "labels")
    if rows.numel() and may_read(rows):
        low, high = int(rows.min()), int(rows.max())
        ok = low >= 0 and high < labels.numel()
        expect(ok, op, "rows", "values", f"in [0, {labels.numel()})", low if low < 0 else high)
        counts = torch.bincount(rows, minlength=1)
        twice = int(counts.argmax())  # its gradient would count twice
        expect(int(counts[twice]) <= 1, op, "rows", "values", "all different", f"{twice} {int(counts[twice])} times")


def check_cu_seqlens(op: str, cu_seqlens: Tensor, tokens: Tensor) -> None:
    """Check the offsets [S + 1] of packed sequences; on the CPU also that they rise from 0 to the number of tokens.

    Elsewhere the kernels check that, and wrong ones give NaN.
    """
    check_dtype(op, "cu_seqlens", cu_seqlens, INDEX_DTYPES)
    ok = cu_seqlens.dim() == 1 and cu_seqlens.numel() >= 1
    expect(ok, op, "cu_seqlens", "shape", "[S + 1]", list(cu_seqlens.shape))
    check_device(op, "cu_seqlens", cu_seqlens, tokens, "labels")
    expect(tokens.dim() == 1, op, "labels", "shape", "[N] (packed, as cu_seqlens is given)", list(tokens.shape))
    if torch.compiler.is_compiling():
        return
    expect(cu_seqlens.numel() > 1 or tokens.numel() == 0, op, "cu_seqlens", "shape", "[S + 1] with S >= 1", [1])
    if may_read(cu_seqlens):
        expected = f"0 <= ... <= {tokens.numel()}, rising from 0 to the number of tokens"
        ok = bool(cu_seqlens[0] == 0 and cu_seqlens[-1] == tokens.numel() and (cu_seqlens.diff() >= 0).all())
        expect(ok, op, "cu_seqlens", "values", expected, cu_seqlens.tolist())


def check_pairs(op: str, arg: str, sequences: int) -> int:
    """The number of pairs P in 2P sequences. Errors if `sequences` is odd."""
    expect(sequences % 2 == 0, op, arg, "number of sequences", "even (chosen first, rejected second)", sequences)
    return sequences // 2


def check_per_pair(op: str, arg: str, tensor: Tensor, pairs: int, like: Tensor) -> None:
    check_dtype(op, arg, tensor, FLOAT_DTYPES)
    expect(list(tensor.shape) == [pairs], op, arg, "shape", f"[{pairs}] (one per pair)", list(tensor.shape))
    check_device(op, arg, tensor, like, "the policy's log-probs")


def check_choice(op: str, arg: str, value: str, choices: tuple[str, ...]) -> None:
    expect(value in choices, op, arg, "value", " or ".join(map(repr, choices)), repr(value))
