"""Attention over token trees: several answers share one prompt, which is computed once."""

from .attention import KERNELS, tree_attention
from .layout import TokenTree

__all__ = ["KERNELS", "TokenTree", "tree_attention"]
