"""Builds csrc/ into cwdpo_kernels/libcwdpo_cpu.so where a C++ compiler and torch are found; everything else is in
pyproject.toml.

The object uses PyTorch's stable ABI and nothing of Python's: one file serves every Python and every torch from 2.11
on, so its wheel is tagged for neither. Where it cannot be built, the installation goes on without it: the package
then runs its portable backend and says so (`cwdpo_kernels.backend("cpu")`, `cwdpo check`).
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NAME = "libcwdpo_cpu"
TORCH_2_11 = "0x020b000000000000"  # the oldest torch whose stable ABI is used


def torch_folder() -> Path | None:
    """Where torch is installed; in an isolated build that cannot import it, where the environment itself has it."""
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent if spec and spec.origin else Path(sysconfig.get_path("purelib")) / "torch"
    return folder if (folder / "include").is_dir() else None


def extensions() -> list[Extension]:
    torch = torch_folder()
    if torch is None or os.name != "posix":
        print("cwdpo_kernels: the C++ backend is left out (torch is not installed here)", flush=True)
        return []
    return [
        Extension(
            f"cwdpo_kernels.{NAME}",
            sources=sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
            language="c++",
            define_macros=[("TORCH_TARGET_VERSION", TORCH_2_11)],
            extra_compile_args=[
                "-std=c++20", "-O3", "-g0", "-fopenmp-simd", "-fvisibility=hidden", "-Wall", "-Wextra",
                # What vectorising an exponential needs; never -ffast-math, which would undo its rounding tricks.
                "-fno-math-errno", "-fno-trapping-math",
                f"-isystem{torch / 'include'}",
            ],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            optional=True,  # no compiler: a warning, and an installation without it
        )
    ]  # fmt: skip


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # no PyInit: it registers itself when it is loaded


class AnyPythonWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel})
