"""`cwdpo check`: the environment, which backend runs on each device, and what helps where it is not the fastest."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import cwdpo_kernels

PACKAGES = ("torch", "triton", "transformers", "accelerate")


def environment_report() -> str:
    """Lines of "what  value"; the reason follows where a device has to do without its faster backend."""
    lines = [("cwdpo_kernels", cwdpo_kernels.__version__), ("python", platform.python_version())]
    lines += [(package, _version(package)) for package in PACKAGES]
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            lines.append(("backend on cuda", "no GPU that torch can use"))
            continue
        lines.append((f"backend on {device}", cwdpo_kernels.backend(device)))
        reason = cwdpo_kernels.missing_backend(device)
        if reason:
            lines.append(("", reason))
    return "\n".join(f"{what:18}{value}" for what, value in lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
