"""How an op is registered: its schema once, then one implementation per backend.

`portable` serves every device ("default"). A faster backend registers the same schema under a device's own dispatch
key, and the dispatcher prefers it: nothing above the ops changes. Triton is imported at its first call; the C++ backend
registers itself when its library is loaded (see `library`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator

import torch

from . import library

NAMESPACE = "cwdpo"
_PORTABLE: dict[str, Callable] = {}
_TRITON: dict[str, Callable] = {}
_FORCED: dict[str, str] = {}  # device type -> the backend that `forced` put there


def define(name: str, schema: str) -> None:
    """Declare the op `cwdpo::name` with its schema."""
    torch.library.define(f"{NAMESPACE}::{name}", schema)


def implement(name: str, function: Callable, triton: str | None = None) -> None:
    """Register the portable implementation for every device and, where there is one, the Triton kernel for GPUs.

    `triton` names the module of `cwdpo_kernels.triton` that has a function called like the op. It serves every dtype
    but float64, which stays with `portable`: the truth is nobody's fast path.
    """
    _PORTABLE[name] = _without_autocast(function)
    torch.library.impl(f"{NAMESPACE}::{name}", "default", _PORTABLE[name])
    if triton is not None:
        _TRITON[name] = _without_autocast(_float64_to(function, _lazy(f"cwdpo_kernels.triton.{triton}", name)))
        if importlib.util.find_spec("triton") is not None:
            torch.library.impl(f"{NAMESPACE}::{name}", "cuda", _TRITON[name])


@contextlib.contextmanager
def forced(device_type: str, name: str) -> Iterator[None]:
    """Inside, the ops on `device_type` run the backend `name` ("portable", "triton" or "csrc").

    Ops that the backend does not have stay as they were. Triton on "cpu" needs its interpreter.
    Errors: RuntimeError if the backend is not to be had there: it is never replaced by another.
    """
    reason = missing_backend(device_type) if name == "csrc" and device_type == "cpu" else None
    if reason or (name == "csrc" and device_type != "cpu"):
        raise RuntimeError(f"forced: expected the backend csrc on {device_type}, got none: {reason or 'CPU only'}")
    override = torch.library.Library(NAMESPACE, "IMPL")
    implementations = {"portable": _PORTABLE, "triton": _TRITON, "csrc": {}}[name]
    with warnings.catch_warnings():  # overriding what is registered is the purpose
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for op, function in implementations.items():
            override.impl(op, function, device_type.upper(), allow_override=True)
    before = _FORCED.get(device_type)
    _FORCED[device_type] = name
    try:
        yield
    finally:
        override._destroy()
        del _FORCED[device_type]
        if before is not None:
            _FORCED[device_type] = before


def backend(device: str | torch.device = "cpu") -> str:
    """Name of the backend that serves `device`: "triton", "csrc" or "portable".

    Float64 on a GPU and the ops that a faster backend lacks are always portable's.
    Errors: RuntimeError (torch's own) for a device type that torch does not know.
    """
    device_type = torch.device(device).type
    faster = {"cuda": "triton", "cpu": "csrc"}.get(device_type, "portable")
    return _FORCED.get(device_type) or ("portable" if missing_backend(device_type) else faster)


def missing_backend(device: str | torch.device = "cpu") -> str | None:
    """Why `device` has to do without the faster backend made for it, and what helps; None where it has it."""
    device_type = torch.device(device).type
    if device_type == "cpu":
        return library.missing()
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return None


def _first_tensor(args: tuple) -> torch.Tensor:
    return next(arg for arg in args if isinstance(arg, torch.Tensor))


def _without_autocast(function: Callable) -> Callable:
    """A backend chooses its own precision: an autocast region of the caller would round its float32 products."""

    @functools.wraps(function)
    def call(*args):
        device_type = _first_tensor(args).device.type
        if not torch.is_autocast_enabled(device_type):
            return function(*args)
        with torch.autocast(device_type, enabled=False):
            return function(*args)

    return call


def _float64_to(portable: Callable, fast: Callable) -> Callable:
    def call(*args):
        function = portable if _first_tensor(args).dtype == torch.float64 else fast
        return function(*args)

    return call


def _lazy(module: str, name: str) -> Callable:
    """The function, imported when it is called; on a GPU with its arguments' device as the current one."""

    def call(*args):
        function = getattr(importlib.import_module(module), name)
        device = _first_tensor(args).device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return function(*args)

    return call
