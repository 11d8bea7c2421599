"""How an op is registered: its schema once, then one implementation per backend.

`portable` is registered for every device ("default"). A faster backend registers the same schema under a
device's own dispatch key, and the dispatcher prefers it: nothing above the ops changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

NAMESPACE = "cwdpo"
FASTER_BACKENDS = {"cuda": "triton", "cpu": "csrc"}


def define(name: str, schema: str) -> None:
    """Declare the op `cwdpo::name` with its schema."""
    torch.library.define(f"{NAMESPACE}::{name}", schema)


def implement(name: str, device_type: str, function: Callable) -> None:
    """Register a Python implementation for a device type ("cuda", ...) or for all of them ("default").

    Autocast is switched off inside: a backend chooses its own precision, and an autocast region of the caller
    would otherwise round its float32 products.
    """

    @functools.wraps(function)
    def without_autocast(*args):
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        if not torch.is_autocast_enabled(device.type):
            return function(*args)
        with torch.autocast(device.type, enabled=False):
            return function(*args)

    torch.library.impl(f"{NAMESPACE}::{name}", device_type, without_autocast)


def backend(device: str | torch.device = "cpu") -> str:
    """Name of the backend that serves `device`: "triton", "csrc" or "portable".

    Errors: RuntimeError (torch's own) for a device type that torch does not know.
    """
    device_type = torch.device(device).type
    faster = FASTER_BACKENDS.get(device_type)
    key = torch._C._dispatch_key_for_device(device_type)
    served = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::linear_logprob", key)
    return faster if faster and served else "portable"
