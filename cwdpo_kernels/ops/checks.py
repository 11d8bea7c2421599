"""Checks of an op's arguments, by their names in its schema, for calls below the public functions.

The public functions check more and name their own arguments. These checks hold for calls through torch.ops and from
compiled graphs: no argument may make a kernel read or write outside its tensors. csrc has its own (csrc/check.h).
Nothing here waits for a GPU: values of labels and cu_seqlens are read on a CPU only.
"""

from __future__ import annotations

from torch import Tensor

from .. import validation as check
from ..portable.tiles import compute_dtype
from .schema import Values

PER_TOKEN = (  # [N]
    "labels", "logp", "anchor", "max_logit", "sum_exp", "grad_logp", "grad_target", "exp_factor", "log_factor",
)  # fmt: skip
SAVED = ("anchor", "max_logit", "sum_exp", "grad_target", "exp_factor", "log_factor")  # in the compute dtype
PER_SEQUENCE = ("count", "grad_sum_logp", "grad_mean")  # [S]
PER_PAIR = ("ref_chosen", "ref_rejected")  # [P] of S = 2P
SIZES = ("kept_bytes", "workspace_bytes")
# A value of `kept_bytes`: like None, keep tiles in memory of the weight's shape, but leave its unused bytes
# uninitialized instead of zero, and let backward write the gradient there. The op's result `kept` then differs from
# call to call and changes in backward, so only the public functions ask for it: they drop that result.
UNINITIALIZED = -1


def check_arguments(op: str, values: Values) -> None:
    """Raise ValueError for the first argument of `op` that does not fit the others."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        check.check_device(op, name, tensor, first, first_name)
    for name in ("labels", "cu_seqlens", "count"):
        if name in tensors:
            check.check_dtype(op, name, tensors[name], check.INDEX_DTYPES)
    if "labels" in tensors:
        check.check_ignore_index(op, values["ignore_index"], tensors["labels"])
    for side in ("", "_p", "_q"):
        if f"hidden{side}" in tensors:
            _check_head(op, side, values)
    if "logits" in tensors:
        _check_dims(op, "logits", tensors["logits"], 2)
        check.check_dtype(op, "logits", tensors["logits"], check.FLOAT_DTYPES)
        check.expect(tensors["logits"].shape[1] >= 1, op, "logits", "V", ">= 1", 0)
        if op.endswith("_"):
            _check_separate_entries(op, "logits", tensors["logits"])
    if "hidden_p" in tensors:
        for name, like in (("hidden_q", "hidden_p"), ("weight_q", "weight_p")):
            _check_shape(op, name, tensors[name], [tensors[like].shape[0], tensors[name].shape[1]])
    _check_tokens(op, tensors)
    if "cu_seqlens" in tensors:
        _check_sequences(op, tensors)
    if "labels" in tensors and ("weight" in tensors or "logits" in tensors):
        matrix, rows_name, columns = ("weight", "hidden", 0) if "weight" in tensors else ("logits", "logits", 1)
        # With `partial`, labels outside the head's vocabulary belong to another process.
        vocab = None if values.get("partial") else tensors[matrix].shape[columns]
        check.check_labels(op, tensors["labels"], tensors[rows_name], rows_name, vocab, values["ignore_index"])
    if values.get("partial") and values.get("with_direction"):
        check.fail(op, "with_direction", "value", "False with partial", True)
    if "mode" in values:
        check.check_choice(op, "mode", values["mode"], check.SFT_MODES)
    for name in SIZES:
        if values.get(name) is not None:
            least = UNINITIALIZED if name == "kept_bytes" else 0
            check.expect(values[name] >= least, op, name, "value", f">= {least}", values[name])
    if "kept" in tensors:
        check.expect(tensors["kept"].is_contiguous(), op, "kept", "layout", "contiguous", "strided")
        if op.endswith("_"):
            _check_shape(op, "kept", tensors["kept"], list(tensors["weight"].shape))
            check.check_dtype(op, "kept", tensors["kept"], (tensors["weight"].dtype,))


def _check_head(op: str, side: str, values: Values) -> None:
    hidden, weight, bias = (values[f"{name}{side}"] for name in ("hidden", "weight", "bias"))
    check.check_dtype(op, f"hidden{side}", hidden, check.FLOAT_DTYPES)
    _check_dims(op, f"hidden{side}", hidden, 2)
    _check_dims(op, f"weight{side}", weight, 2)
    check.expect(hidden.shape[1] >= 1, op, f"hidden{side}", "D", ">= 1", 0)
    if op.startswith(("softmax_sums", "token_stats")):
        check.expect(weight.shape[0] >= 1, op, "weight", "V", ">= 1", 0)
    _check_shape(op, f"weight{side}", weight, [weight.shape[0], hidden.shape[1]])
    check.check_dtype(op, f"weight{side}", weight, (hidden.dtype,))
    if bias is not None:
        _check_shape(op, f"bias{side}", bias, [weight.shape[0]])
        check.check_dtype(op, f"bias{side}", bias, (hidden.dtype,))
    check.check_softcap(op, f"softcap{side}", values[f"softcap{side}"], hidden.dtype)


def _check_tokens(op: str, tensors: dict[str, Tensor]) -> None:
    """All arguments per token have the same length [N]; what backward saved has the compute dtype."""
    matrix = tensors.get("hidden", tensors.get("logits"))
    given = [name for name in PER_TOKEN if name in tensors]
    if not given:
        return
    tokens = tensors[given[0]].numel() if matrix is None else matrix.shape[0]
    for name in given:
        _check_shape(op, name, tensors[name], [tokens])
        if name in SAVED and matrix is not None:
            check.check_dtype(op, name, tensors[name], (compute_dtype(matrix.dtype),))
            check.expect(tensors[name].is_contiguous(), op, name, "layout", "contiguous", "strided")


def _check_sequences(op: str, tensors: dict[str, Tensor]) -> None:
    cu_seqlens = tensors["cu_seqlens"]
    tokens = tensors["logp"] if "logp" in tensors else tensors["labels"]
    check.check_cu_seqlens(op, cu_seqlens, tokens)
    sequences = cu_seqlens.numel() - 1
    for name in PER_SEQUENCE:
        if name in tensors:
            _check_shape(op, name, tensors[name], [sequences])
    if op in ("cwdpo_loss", "constrained_sft_loss"):
        pairs = check.check_pairs(op, "cu_seqlens", sequences)
        for name in PER_PAIR:
            if name in tensors:
                _check_shape(op, name, tensors[name], [pairs])


def _check_separate_entries(op: str, name: str, matrix: Tensor) -> None:
    """No two entries of a matrix that a kernel overwrites share memory (sufficient: rows or columns do not overlap)."""
    dims = sorted((stride, size) for stride, size in zip(matrix.stride(), matrix.shape, strict=True) if size > 1)
    ends = [1, *(stride * (size - 1) + 1 for stride, size in dims)]
    ok = matrix.numel() == 0 or all(stride >= end for (stride, _), end in zip(dims, ends, strict=False))
    check.expect(ok, op, name, "layout", "without entries that share memory", f"strides {list(matrix.stride())}")


def _check_dims(op: str, name: str, tensor: Tensor, dims: int) -> None:
    check.expect(tensor.dim() == dims, op, name, "dimensions", dims, tensor.dim())


def _check_shape(op: str, name: str, tensor: Tensor, expected: list[int]) -> None:
    check.expect(list(tensor.shape) == expected, op, name, "shape", expected, list(tensor.shape))
