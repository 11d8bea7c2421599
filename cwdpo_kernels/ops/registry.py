"""Backends: which kernels run an op on which device.

A Python backend is a subpackage of the same name with one file per op. The function `linear_logprob` in
`portable/linear_logprob.py` is the kernel of the op `linear_logprob`; its backward ops are in the same file. A file is
imported at the first call of its kernel. A backend may lack ops.

One backend, the fallback, serves every device (device None). Each other backend serves one device type, where torch's
dispatcher prefers its kernels. docs/contributing/backend.md says how to add a backend.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from . import schema
from .checks import check_arguments

PACKAGE = __package__.rpartition(".")[0]

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Backend:
    """The arguments of `register_backend`, and the backend's Python kernels by op."""

    name: str
    device: str | None
    loader: Callable[[], str | None]
    workspace_bytes: Callable[[], int]
    compiled: bool
    details: Callable[[], Mapping[str, str]]
    kernels: Mapping[str, Kernel]


_BACKENDS: dict[str, Backend] = {}
_FORCED: dict[str, str] = {}  # device type -> the backend that `forced` put there


def register_backend(
    name: str, device: str | None, loader: Callable[[], str | None], *, workspace_bytes: Callable[[], int],
    float64: bool = True, compiled: bool = False, details: Callable[[], Mapping[str, str]] = dict,
) -> None:  # fmt: skip
    """Let the backend `name` serve `device`, after all ops are defined.

    device: a device type such as "cuda", or None for the fallback, which serves every device.
    loader: loads what the backend needs; returns None, or why it cannot run and how to fix that.
    workspace_bytes: returns the default of `MemoryBudget.workspace_bytes`; called only if `loader` succeeded.
    float64: False sends float64 tensors to the fallback.
    compiled: the loaded library registers its own kernels with torch, so there is no Python subpackage.
    details: returns what `backend_details` adds for this backend; called only if `loader` succeeded.
    """
    ops = [] if compiled else [op for op in schema.OPS if _has_kernel(name, op)]
    kernels = {op: _kernel(name, op, float64) for op in ops}
    _BACKENDS[name] = Backend(name, device, loader, workspace_bytes, compiled, details, kernels)
    if loader() is None:
        for op, kernel in kernels.items():
            torch.library.impl(add_op_namespace_prefix(op), device or "default", kernel)


def backend(device: str | torch.device = "cpu") -> str:
    """Name of the backend that serves `device`: "triton", "csrc" or "portable".

    On a GPU, `portable` still runs float64. It also runs the ops that a faster backend lacks.
    Errors: RuntimeError (torch's own) for a device type that torch does not know.
    """
    device_type = torch.device(device).type
    return _FORCED.get(device_type) or _serving(device_type).name


def missing_backend(device: str | torch.device = "cpu") -> str | None:
    """Why the faster backend for `device` is unavailable, and how to fix that. None if it runs or none exists."""
    faster = _faster(torch.device(device).type)
    return None if faster is None else faster.loader()


def default_workspace_bytes(device: str | torch.device = "cpu") -> int:
    """The workspace, in bytes, that `MemoryBudget(workspace_bytes=None)` gives the ops on `device`."""
    return _BACKENDS[backend(device)].workspace_bytes()


def backend_details(device: str | torch.device = "cpu") -> dict[str, str]:
    """The backend that serves `device` and, for the C++ one, what it runs on this processor.

    float32, bfloat16: how matrix products of such operands are computed: by own kernels, with their instruction set, or
    by torch.mm. bfloat16 heads without own kernels are converted to float32, tile by tile. float16: as float32.
    loops: the instruction set of the loops over tiles (exponentials, sums, conversions).
    not used: AMX, on a processor that has it, if the compiler did not know it, the system does not permit it, or its
    products were wrong in a test.
    """
    name = backend(device)
    return {"backend": name, **_BACKENDS[name].details()}


@contextlib.contextmanager
def forced(device_type: str, name: str) -> Iterator[None]:
    """Context in which the ops on `device_type` run the backend `name` ("portable", "triton" or "csrc").

    Ops that the backend lacks do not change. Triton on "cpu" needs its interpreter.
    Errors: RuntimeError if the backend is unavailable on that device; another one is never used instead.
    """
    chosen = _BACKENDS[name]
    elsewhere = chosen.compiled and device_type != chosen.device
    reason = f"{str(chosen.device).upper()} only" if elsewhere else chosen.loader()
    if reason is not None:
        raise RuntimeError(f"forced: expected the backend {name} on {device_type}, got none: {reason}")
    override = torch.library.Library(schema.NAMESPACE, "IMPL")
    with warnings.catch_warnings():  # torch warns about every kernel that is overridden
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for op, kernel in chosen.kernels.items():
            override.impl(op, kernel, device_type.upper(), allow_override=True)
    before = _FORCED.get(device_type)
    _FORCED[device_type] = name
    try:
        yield
    finally:
        override._destroy()
        del _FORCED[device_type]
        if before is not None:
            _FORCED[device_type] = before


def _faster(device_type: str) -> Backend | None:
    return next((each for each in _BACKENDS.values() if each.device == device_type), None)


def _fallback() -> Backend:
    return next(each for each in _BACKENDS.values() if each.device is None)


def _serving(device_type: str) -> Backend:
    faster = _faster(device_type)
    return faster if faster is not None and faster.loader() is None else _fallback()


def _module(backend_name: str, op: str) -> str:
    """The module of an op's kernel. Backward ops are in the file of their forward op."""
    return f"{PACKAGE}.{backend_name}.{op.partition('_backward')[0]}"


def _has_kernel(backend_name: str, op: str) -> bool:
    return importlib.util.find_spec(_module(backend_name, op)) is not None


@functools.cache
def _function(backend_name: str, op: str) -> Kernel:
    return getattr(importlib.import_module(_module(backend_name, op)), op)


def _kernel(backend_name: str, op: str, float64: bool) -> Kernel:
    """The backend's function, imported at its first call, with its arguments' device current and autocast off.

    A backend chooses its own precision; the caller's autocast region would round its float32 products.
    """

    def call(*args: Any) -> Any:
        check_arguments(op, dict(zip(schema.arguments(op), args, strict=True)))
        tensor = next(arg for arg in args if isinstance(arg, Tensor))
        to_fallback = tensor.dtype == torch.float64 and not float64
        function = _function(_fallback().name if to_fallback else backend_name, op)
        device = tensor.device
        with contextlib.ExitStack() as stack:
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            if torch.is_autocast_enabled(device.type):
                stack.enter_context(torch.autocast(device.type, enabled=False))
            return function(*args)

    return call
