"""Builds csrc/ into cwdpo_kernels/libcwdpo_cpu.so if torch and a C++ compiler are available.

pyproject.toml configures everything else.

The library uses PyTorch's stable ABI and no Python API, so one file serves every Python version and every torch from
2.11 on, and the wheel is tagged py3-none. If it cannot be built, the installation succeeds without it: CPU ops then
run the slower portable backend (`cwdpo_kernels.missing_backend("cpu")` and `cwdpo check` say so). `make wheel` refuses
such a wheel.
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
TORCH_2_11 = "0x020b000000000000"  # build against the stable ABI of this version; later ones keep it


def torch_folder() -> Path | None:
    """The folder of the installed torch. An isolated build cannot import it and looks where this Python keeps it."""
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent if spec and spec.origin else Path(sysconfig.get_path("purelib")) / "torch"
    return folder if (folder / "include").is_dir() else None


def extensions() -> list[Extension]:
    torch = torch_folder()
    if torch is None or os.name != "posix":
        print("cwdpo_kernels: the C++ backend is not built, because torch is not installed", flush=True)
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
                # These two let the compiler vectorize exponentials. -ffast-math would break their rounding.
                "-fno-math-errno", "-fno-trapping-math",
                f"-isystem{torch / 'include'}",
            ],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            optional=True,  # if the compiler fails, warn and install without the library
        )
    ]  # fmt: skip


class BuildLibrary(build_ext):
    """Builds a plain shared library: no Python version in its name, no PyInit function."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel py3-none-PLATFORM."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel})
