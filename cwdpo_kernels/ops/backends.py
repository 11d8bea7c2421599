"""The package's backends. A new one is one more call here; docs/contributing/backend.md has the other steps."""

from __future__ import annotations

import importlib.util

from .. import portable, triton
from . import library
from .registry import register_backend


def _load_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return None


def register() -> None:
    register_backend("portable", None, lambda: None, workspace_bytes=lambda: portable.WORKSPACE_BYTES)
    # The Triton kernels compute in float32, so float64 runs on `portable`.
    register_backend("triton", "cuda", _load_triton, workspace_bytes=lambda: triton.WORKSPACE_BYTES, float64=False)
    register_backend(
        "csrc", "cpu", library.load, workspace_bytes=library.workspace_bytes, compiled=True, details=library.details
    )
