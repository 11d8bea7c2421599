"""Logits that forward keeps, so that backward need not compute them again."""

from __future__ import annotations

import torch
from torch import Tensor

from .tiles import TiledHead


class KeptTiles:
    """Logits that forward keeps for backward: for all labelled rows, as many vocabulary tiles as fit in `storage`.

    The tiles fill `storage` from its end. If `storage` is the memory of the weight's gradient [V, D], which backward
    writes from the start, each tile lies behind its own slice of the gradient. It is therefore read before it is
    overwritten.
    """

    def __init__(
        self, storage: Tensor, head: TiledHead, n_rows: int | None = None, selected: Tensor | slice = slice(None)
    ) -> None:
        n_rows = head.hidden.shape[0] if n_rows is None else n_rows
        gradient_row = storage.shape[1] * storage.element_size() if storage.dim() == 2 else 0
        self.head, self.selected, self.tiles_NB = head, selected, {}
        self.bytes = storage.view(-1).view(torch.uint8)
        self.start = self.stop = self.bytes.numel() // head.dtype.itemsize * head.dtype.itemsize
        for columns in reversed(list(head.columns())):
            width = columns.stop - columns.start
            start = self.start - n_rows * width * head.dtype.itemsize
            if start >= columns.stop * gradient_row:
                self.tiles_NB[columns.start] = self.bytes[start : self.start].view(head.dtype).view(n_rows, width)
                self.start = start

    def zero_unused(self) -> None:
        self.bytes[: self.start] = 0
        self.bytes[self.stop :] = 0

    def save(self, tile_RB: Tensor, rows: slice, columns: slice) -> None:
        if columns.start in self.tiles_NB:
            self.tiles_NB[columns.start][rows] = tile_RB

    def load(self, rows: slice, columns: slice) -> Tensor | None:
        """A copy in the head's buffer that the caller may overwrite, or None if the tile was not kept."""
        if columns.start not in self.tiles_NB:
            return None
        kept_RB = self.tiles_NB[columns.start][self.selected][rows]
        return self.head.buffer(*kept_RB.shape).copy_(kept_RB)
