"""The namespace that the package's ops are registered under. Nothing else names it.

Hugging Face's `kernels` library loads several versions of a package into one process. Each version therefore carries
its own copy of this file, with a namespace of its own (see build.toml).
"""

import torch

ops = torch.ops.cwdpo


def add_op_namespace_prefix(op_name: str) -> str:
    """The qualified name of an op, as torch.library takes it."""
    return f"cwdpo::{op_name}"
