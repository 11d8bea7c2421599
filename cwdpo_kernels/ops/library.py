"""Loads the C++ backend: one shared object beside the package, built on installation where there was a compiler.

The object registers itself for CPU tensors under the schemas of `ops`, which therefore have to be defined first.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import torch

PATH = Path(__file__).parents[1] / "libcwdpo_cpu.so"
HOW_TO_BUILD = (
    "install a C++ compiler (g++ or clang++), then this package again, from its source, where torch already is: "
    "pip install --no-deps --force-reinstall --no-build-isolation ."
)


@functools.cache
def missing() -> str | None:
    """None if the C++ backend is loaded (the first call loads it), else why it is not and what helps.

    A library that was built but cannot be loaded is a fault of the installation and also warned about.
    """
    if not PATH.exists():
        return f"the C++ backend was not built: {HOW_TO_BUILD}"
    try:
        torch.ops.load_library(PATH)
    except OSError as error:
        reason = f"the C++ backend was built but cannot be loaded ({error}): {HOW_TO_BUILD}"
        warnings.warn(f"cwdpo_kernels: {reason}", RuntimeWarning, stacklevel=2)
        return reason
    return None
