"""Logits of a linear head, one tile of bounded size at a time, never rounded below float32.

Legend: N rows (labelled tokens), R rows of a block, D hidden, V vocabulary, B columns of a vocabulary tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import WORKSPACE_BYTES

MIN_TILE = 128


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 is computed in float64, every other dtype in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def direction_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a frozen head's direction, d logp / d hidden = (1 - p_y) * direction: that of the inputs.

    float32 for float16, where the direction may overflow although the gradient does not.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def new_direction(hidden: Tensor, with_direction: bool) -> Tensor:
    """A direction [N, D] of zeros; [0, D] if none is wanted."""
    shape = hidden.shape if with_direction else (0, hidden.shape[1])
    return hidden.new_zeros(shape, dtype=direction_dtype(hidden.dtype))


def rows_where(mask: Tensor) -> Tensor | slice:
    """Indices of the rows where `mask` is True. All of them: a slice, which indexes without a copy."""
    rows = mask.nonzero().squeeze(1)
    return slice(None) if rows.numel() == mask.numel() else rows


def blocks(total: int, size: int) -> Iterator[slice]:
    """[0, total) in slices of at most `size`."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


class TiledHead:
    """logits = softcap(scale * (hidden @ weight.T + bias)), `tile_rows` x `tile_columns` entries at a time.

    Every tile overwrites the same buffer. A tile has all rows and as many columns as fit in the workspace; only if
    MIN_TILE columns of all rows do not fit are the rows split, too.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None,
        workspace_bytes: int, max_rows: int | None = None,
    ) -> None:  # fmt: skip
        self.hidden, self.weight, self.bias, self.scale, self.softcap = hidden, weight, bias, scale, softcap
        self.dtype = compute_dtype(hidden.dtype)
        rows, vocab = hidden.shape[0] if max_rows is None else max_rows, weight.shape[0]
        tiles_in_use = 1 if softcap is None else 2  # the soft cap's slope is a second tile
        entries = max((workspace_bytes or WORKSPACE_BYTES) // self.dtype.itemsize // tiles_in_use, MIN_TILE * MIN_TILE)
        self.tile_rows = max(min(rows, entries // MIN_TILE), 1)
        # The float32 copy of a half-precision weight tile also takes workspace: as much as D more rows.
        converted = 0 if weight.dtype == self.dtype else weight.shape[1]
        columns = entries // (self.tile_rows + converted)
        self.tile_columns = min(max(columns // MIN_TILE, 1) * MIN_TILE, vocab)
        self._buffer = hidden.new_empty(self.tile_rows * self.tile_columns, dtype=self.dtype)

    def columns(self) -> Iterator[slice]:
        return blocks(self.weight.shape[0], self.tile_columns)

    def rows(self) -> Iterator[slice]:
        return blocks(self.hidden.shape[0], self.tile_rows)

    def weight_tile(self, columns: slice) -> Tensor:
        return self.weight[columns].to(self.dtype)

    def hidden_block(self, rows: slice) -> Tensor:
        return self.hidden[rows].to(self.dtype)

    def buffer(self, rows: int, columns: int) -> Tensor:
        return self._buffer[: rows * columns].view(rows, columns)

    def transform(self, raw: Tensor, columns: slice | Tensor) -> Tensor:
        """softcap(scale * (raw + bias)), in place."""
        if self.bias is not None:
            raw.add_(self.bias[columns])
        if self.scale != 1.0:
            raw.mul_(self.scale)
        if self.softcap is not None:
            raw.div_(self.softcap).tanh_().mul_(self.softcap)
        return raw

    def logits(self, rows: slice, columns: slice, weight_BD: Tensor) -> Tensor:
        """Logits [R, B], in the shared buffer."""
        hidden_RD = self.hidden_block(rows)
        out = self.buffer(hidden_RD.shape[0], weight_BD.shape[0])
        return self.transform(torch.mm(hidden_RD, weight_BD.T, out=out), columns)

    def target_weight(self, rows: slice, labels_R: Tensor) -> Tensor:
        """The weight's rows of the labels, [R, D]."""
        return self.weight.index_select(0, labels_R).to(self.dtype)

    def target_logits(self, labels_N: Tensor) -> Tensor:
        """c [N], the logit of each row's label: one dot product per row."""
        target_N = torch.empty(self.hidden.shape[0], dtype=self.dtype, device=self.hidden.device)
        for rows in self.rows():
            weight_RD = self.target_weight(rows, labels_N[rows])
            target_N[rows] = torch.linalg.vecdot(self.hidden_block(rows), weight_RD)
        return self.transform(target_N, labels_N)

    def slope(self, logits: Tensor) -> Tensor | None:
        """d softcap(z) / dz = 1 - (softcap(z) / cap)^2 of the capped `logits`, or None without a soft cap."""
        return None if self.softcap is None else (logits / self.softcap).square_().neg_().add_(1.0)


def fill_target(tile_RB: Tensor, labels_R: Tensor, columns: slice, value: float | Tensor) -> None:
    """tile[t, y_t] = value (a number, or [R, 1]) in the rows whose label is among `columns`, without a device sync."""
    local_R1 = (labels_R - columns.start).unsqueeze(1)
    inside = (local_R1 >= 0) & (local_R1 < tile_RB.shape[1])
    spot = local_R1.clamp(0, tile_RB.shape[1] - 1)
    tile_RB.scatter_(1, spot, torch.where(inside, value, tile_RB.gather(1, spot)))
