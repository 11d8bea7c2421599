"""Loads the C++ backend: one shared library in the package's folder, built on installation if there is a compiler.

The library registers its own kernels for CPU tensors, under the namespace of this copy of the package.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path

import torch

from .schema import NAMESPACE

FOLDER = Path(__file__).parents[1]
BUILT_BY_KERNEL_BUILDER = FOLDER / f"{NAMESPACE}.abi3.so"
PATH = BUILT_BY_KERNEL_BUILDER if BUILT_BY_KERNEL_BUILDER.exists() else FOLDER / "libcwdpo_cpu.so"
HOW_TO_BUILD = (
    "install a C++ compiler (g++ or clang++), then reinstall this package from source into the environment that has "
    "torch: pip install --no-deps --force-reinstall --no-build-isolation ."
)


def load() -> str | None:
    """Load the library, once; return None, or why it cannot be loaded and how to fix that.

    A library that exists but cannot be loaded also raises a RuntimeWarning, because the installation is broken.
    """
    if not PATH.exists():
        return f"the C++ backend was not built: {HOW_TO_BUILD}"
    return _load(PATH)


@functools.cache
def _load(path: Path) -> str | None:
    try:
        torch.ops.load_library(path)
        ctypes.CDLL(str(path)).cwdpo_register(NAMESPACE.encode())
    except (OSError, AttributeError) as error:  # AttributeError: built from another version's sources
        reason = f"the C++ backend was built but cannot be loaded ({error}): {HOW_TO_BUILD}"
        warnings.warn(f"cwdpo_kernels: {reason}", RuntimeWarning, stacklevel=3)
        return reason
    return None


def workspace_bytes() -> int:
    """The library's default workspace, in bytes; `load` must have succeeded."""
    default = ctypes.CDLL(str(PATH)).cwdpo_workspace_bytes
    default.restype = ctypes.c_int64
    return default()


def parallel_regions() -> int:
    """How many parallel regions the library has opened, for tests and benchmarks; `load` must have succeeded."""
    count = ctypes.CDLL(str(PATH)).cwdpo_parallel_regions
    count.restype = ctypes.c_int64
    return count()


def details() -> dict[str, str]:
    """What the library runs on this processor (see `backend_details`); `load` must have succeeded."""
    instructions = ctypes.CDLL(str(PATH)).cwdpo_instructions
    instructions.restype = ctypes.c_char_p
    found = {name: instructions(name.encode()).decode() for name in ("float32", "bfloat16", "loops", "not used")}
    return {name: value for name, value in found.items() if value}
