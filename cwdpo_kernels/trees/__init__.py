"""Attention over token trees: several answers share one prompt, which is computed once."""

from .attention import tree_attention
from .layout import TokenTree

__all__ = ["TokenTree", "tree_attention"]
