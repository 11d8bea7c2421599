"""linear_logprob on a GPU: the algebra of portable/linear_logprob.py, a vocabulary chunk at a time.

Forward: one sweep (1G = 2 N D V floating-point operations), O(N T) scratch.
Frozen head: the sweep writes its exponentials a chunk at a time in the inputs' dtype, the vendor's GEMM adds up
    pushed = sum_v u_v W_v in float32 (2G in all). A chunk whose anchor rises moves what is there by powers of two.
Backward, trainable head: per chunk, the gradient of its logits in the inputs' dtype, from the exponentials that
    forward kept or recomputed, then two GEMMs: grad_weight of the chunk, written once, and grad_hidden in float32
    (2G or 3G). What is kept lies in the memory of grad_weight, and is read before the gradient comes to it.
    Blocks of tokens without an upstream gradient skip the recomputation and, where the caller says that there will
    be such tokens (`sparse_grad`), both GEMMs: our own then, since the vendor's cannot take a size from the device.

`peak` of the op is the anchor of primitives.py. Nothing waits for the device; no atomics, so the same input gives the
same bits. Legend: N tokens, D hidden, V vocabulary, T vocabulary tiles, B = BLOCK_V, C columns of a chunk of tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import WORKSPACE_BYTES
from .combine import empty_sums, join_tiles, move_anchor
from .configs import COMPILER_OPTIONS, grid, tile_config
from .gemm import AllRows, LiveBlocks
from .primitives import exp_anchored, logits_tile, rounded, slope_of, tile_position
from .sweep import Sweep, tile_arguments

DIRECTION_BLOCK_N, DIRECTION_BLOCK_D = 16, 128


def linear_logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, softcap: float | None,
    ignore_index: int, with_direction: bool, sparse_grad: bool, workspace_bytes: int, kept_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """logp [N], peak (anchor) [N], total [N], direction [N, D] (or empty), kept tiles (opaque bytes or [V, D])."""
    labels = labels.contiguous()
    sweep = Sweep(hidden, weight, bias, labels, scale, softcap, ignore_index)
    in_gradient = kept_bytes is None
    kept = torch.empty_like(weight) if in_gradient else hidden.new_empty(kept_bytes, dtype=torch.uint8)
    if with_direction:
        return *_forward_frozen(sweep, workspace_bytes), kept

    kept_chunks = KeptChunks(kept, hidden, sweep.vocab, sweep.config.block_v, softcap, workspace_bytes)
    if not in_gradient:  # no byte of an output is left uninitialised, but those that backward writes: they are many
        kept_chunks.zero_the_rest()
    for tiles in kept_chunks.chunks if kept_chunks.views else [range(sweep.tiles_v)]:
        tile_NC, anchor_TN = kept_chunks.views.get(tiles.start, (None, None))
        sweep.run(tiles, out=tile_NC)
        if anchor_TN is not None:
            anchor_TN.copy_(sweep.anchor_TN[tiles.start : tiles.stop])
    anchor_N, total_N = empty_sums(sweep.rows, hidden.device)
    every = range(sweep.tiles_v)
    logp_N = join_tiles(sweep.anchor_TN, sweep.total_TN, every, anchor_N, total_N, labels, ignore_index, sweep.target_N)
    return logp_N, anchor_N, total_N, hidden.new_empty(0, hidden.shape[1]), kept


def _forward_frozen(sweep: Sweep, workspace_bytes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, block_v = sweep.hidden, sweep.weight, sweep.config.block_v
    anchor_N, total_N = empty_sums(sweep.rows, hidden.device)
    pushed_ND = hidden.new_zeros(hidden.shape, dtype=torch.float32)
    chunk = _tiles_per_chunk(sweep.rows, hidden.element_size(), block_v, workspace_bytes)
    workspace = hidden.new_empty(sweep.rows * min(chunk * block_v, sweep.vocab))
    for start in range(0, sweep.tiles_v, chunk):
        tiles = range(start, min(start + chunk, sweep.tiles_v))
        columns = slice(tiles.start * block_v, min(tiles.stop * block_v, sweep.vocab))
        width = columns.stop - columns.start
        tile_NC = workspace[: sweep.rows * width].view(sweep.rows, width)
        before_N = anchor_N.clone()
        sweep.run(tiles, running=before_N, out=tile_NC)
        join_tiles(sweep.anchor_TN, sweep.total_TN, tiles, anchor_N, total_N, sweep.labels, sweep.ignore_index)
        move_anchor(tile_NC, sweep.anchor_TN, anchor_N, tiles, block_v)
        move_anchor(pushed_ND, before_N[None], anchor_N, range(1), triton.next_power_of_2(hidden.shape[1]))
        AllRows.accumulate(pushed_ND, tile_NC, weight[columns])
    # Every tile has been joined: an empty range only finishes.
    logp_N = join_tiles(
        sweep.anchor_TN, sweep.total_TN, range(0), anchor_N, total_N, sweep.labels, sweep.ignore_index, sweep.target_N
    )
    return logp_N, anchor_N, total_N, _direction(sweep, pushed_ND, total_N)


@triton.jit
def _direction_kernel(
    pushed_ptr, weight_ptr, labels_ptr, target_ptr, total_ptr, out_ptr, N, V, D, stride_weight_v, stride_weight_d,
    scale, softcap, ignore_index, HAS_SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = scale * (slope_y W_y - pushed / total); 0 where ignored."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n, mask_d = offs_n < N, offs_d < D
    labels = tl.load(labels_ptr + offs_n, mask=mask_n, other=ignore_index).to(tl.int64)
    labelled = (labels != ignore_index) & (labels >= 0) & (labels < V)
    total = tl.load(total_ptr + offs_n, mask=mask_n, other=0.0)
    offs_weight = labels[:, None] * stride_weight_v + offs_d.to(tl.int64)[None, :] * stride_weight_d
    pull = tl.load(weight_ptr + offs_weight, mask=labelled[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        pull *= slope_of(tl.load(target_ptr + offs_n, mask=labelled, other=0.0), softcap)[:, None]
    offs = offs_n.to(tl.int64)[:, None] * D + offs_d[None, :]
    mask = mask_n[:, None] & mask_d[None, :]
    pushed = tl.load(pushed_ptr + offs, mask=mask & labelled[:, None], other=0.0)
    # Without any competitor (V = 1) total is 0 and so is pushed.
    push = pushed / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + offs, rounded(scale * (pull - push), out_ptr.dtype.element_ty), mask=mask)


def _direction(sweep: Sweep, pushed_ND: Tensor, total_N: Tensor) -> Tensor:
    rows, dim = pushed_ND.shape
    out = torch.empty(rows, dim, dtype=sweep.hidden.dtype, device=sweep.hidden.device)
    if rows and dim:
        blocks = triton.cdiv(rows, DIRECTION_BLOCK_N), triton.cdiv(dim, DIRECTION_BLOCK_D)
        _direction_kernel[blocks](
            pushed_ND, sweep.weight, sweep.labels, sweep.target_N, total_N, out, rows, sweep.vocab, dim,
            *sweep.weight.stride(), sweep.scale, 1.0 if sweep.softcap is None else sweep.softcap, sweep.ignore_index,
            HAS_SOFTCAP=sweep.softcap is not None, BLOCK_N=DIRECTION_BLOCK_N, BLOCK_D=DIRECTION_BLOCK_D,
            **COMPILER_OPTIONS,
        )  # fmt: skip
    return out


@triton.jit
def _gradient_kernel(
    hidden, weight, bias_ptr, labels_ptr, anchor_ptr, push_ptr, pull_ptr, kept_ptr, kept_anchor_ptr, out_ptr,
    column_sum_ptr, N, V, D, first_tile_v, end_tile_v, out_columns,
    stride_hidden_n, stride_hidden_d, stride_weight_v, stride_weight_d, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, KEPT: tl.constexpr, COLUMN_SUMS: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, FLATTEN: tl.constexpr,
    GROUP_N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [N, C] = slope * (push * exp(z - anchor ln 2), or pull at the label): the gradient of unscaled logits."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_v = end_tile_v - first_tile_v
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_v, tl.num_programs(0), flatten=FLATTEN):
        pid_n, pid_v = tile_position(tile, tiles_n, tiles_v, GROUP_N)
        row = pid_n * BLOCK_N
        tile_v = first_tile_v + pid_v
        col = tile_v * BLOCK_V
        offs_n = row + tl.arange(0, BLOCK_N)
        offs_v = col + tl.arange(0, BLOCK_V)
        mask_n = offs_n < N
        anchor = tl.load(anchor_ptr + offs_n, mask=mask_n, other=0.0)
        push = tl.load(push_ptr + offs_n, mask=mask_n, other=0.0)
        pull = tl.load(pull_ptr + offs_n, mask=mask_n, other=0.0)
        labels = tl.load(labels_ptr + offs_n, mask=mask_n, other=-1).to(tl.int32)
        if KEPT:
            offs_c = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
            offs_kept = offs_n.to(tl.int64)[:, None] * out_columns + offs_c[None, :]
            mask_kept = mask_n[:, None] & (offs_c < out_columns)[None, :]
            u = tl.load(kept_ptr + offs_kept, mask=mask_kept, other=0.0).to(tl.float32)
            kept_anchor = tl.load(kept_anchor_ptr + pid_v.to(tl.int64) * N + offs_n, mask=mask_n, other=0.0)
            # Of an ignored token the anchors are of different logits: exp2 may overflow.
            gradient = tl.where((push != 0)[:, None], u * (push * tl.exp2(kept_anchor - anchor))[:, None], 0.0)
        else:
            live = tl.max(tl.where((push != 0) | (pull != 0), 1, 0), 0)
            depth = tl.where(live > 0, D, 0)  # a block without an upstream gradient: zeros, and no product
            z = logits_tile(
                hidden, weight, bias_ptr, row, col, N, V, depth, stride_hidden_n, stride_hidden_d, stride_weight_v,
                stride_weight_d, scale, softcap, HAS_BIAS, HAS_SOFTCAP, PRECISION, DESCRIPTORS, BLOCK_N,
                BLOCK_V, BLOCK_D,
            )  # fmt: skip
            gradient = tl.where((push != 0)[:, None], push[:, None] * exp_anchored(z, anchor[:, None]), 0.0)
        # Over the label's own exponential, which may have overflowed.
        gradient = tl.where(offs_v[None, :] == labels[:, None], pull[:, None], gradient)
        if HAS_SOFTCAP:
            gradient *= slope_of(z, softcap)
        gradient = tl.where(mask_n[:, None] & (offs_v < V)[None, :], gradient, 0.0)
        if COLUMN_SUMS:
            tl.store(column_sum_ptr + pid_n.to(tl.int64) * V + offs_v, tl.sum(gradient, 0), mask=offs_v < V)
        offs_c = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)  # after the product, which has no register left for it
        offs_out = offs_n.to(tl.int64)[:, None] * out_columns + offs_c[None, :]
        mask_out = mask_n[:, None] & (offs_c < out_columns)[None, :]
        tl.store(out_ptr + offs_out, rounded(gradient, out_ptr.dtype.element_ty), mask=mask_out)


def linear_logprob_backward(
    grad_logp: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, logp: Tensor,
    peak: Tensor, total: Tensor, kept: Tensor, scale: float, softcap: float | None, ignore_index: int,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool, sparse_grad: bool, workspace_bytes: int,
    grad_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden [N, D], weight [V, D] and bias [V] for a trainable head; empty where not needed.

    The weight's goes into `grad_weight`, where that is given.
    """
    if grad_weight is None:
        grad_weight = torch.empty_like(weight) if needs_weight else weight.new_empty(0)
    rows, vocab, config = hidden.shape[0], weight.shape[0], tile_config(hidden, softcap)
    # 1 - p_y = -expm1(logp); without any competitor (V = 1) total is 0 and nothing is pushed.
    pull_N = torch.where(labels != ignore_index, grad_logp * -torch.expm1(logp) * scale, 0.0)
    push_N = torch.where(total > 0, -pull_N / total, 0.0)
    grad_hidden_ND = hidden.new_zeros(hidden.shape if needs_hidden else 0, dtype=torch.float32)
    if rows == 0:
        grad_weight.zero_()
    tiles_n = triton.cdiv(rows, config.block_n)
    column_sum = hidden.new_empty((tiles_n, vocab) if needs_bias else 0, dtype=torch.float32)

    gemms = LiveBlocks.of((pull_N != 0) | (push_N != 0), config) if sparse_grad else AllRows
    kept_chunks = KeptChunks(kept, hidden, vocab, config.block_v, softcap, workspace_bytes)
    workspace = hidden.new_empty(rows * max((kept_chunks.width(tiles) for tiles in kept_chunks.chunks), default=0))
    arguments = {
        **tile_arguments(hidden, weight, bias, scale, softcap, config), "labels_ptr": labels.contiguous(),
        "anchor_ptr": peak, "push_ptr": push_N, "pull_ptr": pull_N, "column_sum_ptr": column_sum, "N": rows,
        "V": vocab, "D": hidden.shape[1], "COLUMN_SUMS": needs_bias,
    }  # fmt: skip
    for tiles in kept_chunks.chunks:
        start, width = tiles.start * config.block_v, kept_chunks.width(tiles)
        columns = slice(start, start + width)
        grad_NC = workspace[: rows * width].view(rows, width)
        kept_NC, kept_anchor_TN = kept_chunks.views.get(tiles.start, (grad_NC, peak))  # of others nothing is read
        _gradient_kernel[grid(config, tiles_n * len(tiles), hidden.device)](
            **arguments, kept_ptr=kept_NC, kept_anchor_ptr=kept_anchor_TN, out_ptr=grad_NC, first_tile_v=tiles.start,
            end_tile_v=tiles.stop, out_columns=width, KEPT=tiles.start in kept_chunks.views, **COMPILER_OPTIONS,
        )  # fmt: skip
        if needs_weight:
            gemms.product(grad_weight[columns], grad_NC, hidden)
        if needs_hidden:
            gemms.accumulate(grad_hidden_ND, grad_NC, weight[columns])
    # In the layout of hidden, as the op's fake promises.
    grad_hidden = torch.empty_like(hidden).copy_(grad_hidden_ND) if needs_hidden else hidden.new_empty(0)
    return grad_hidden, grad_weight, column_sum.sum(0).to(hidden.dtype)


def linear_logprob_backward_(*arguments) -> tuple[Tensor, Tensor]:
    """The same with the weight's gradient written over `kept` [V, D], in whose memory the tiles are."""
    *saved, kept, scale, softcap, ignore_index, needs_hidden, needs_bias, sparse_grad, workspace_bytes = arguments
    options = (scale, softcap, ignore_index, needs_hidden, True, needs_bias, sparse_grad, workspace_bytes)
    grad_hidden, _, grad_bias = linear_logprob_backward(*saved, kept, *options, grad_weight=kept)
    return grad_hidden, grad_bias


def _tiles_per_chunk(rows: int, itemsize: int, block_v: int, workspace_bytes: int) -> int:
    return max((workspace_bytes or WORKSPACE_BYTES) // max(rows * block_v * itemsize, 1), 1)


class KeptChunks:
    """The exponentials of vocabulary chunks, kept from forward for backward, and the anchors of their tiles.

    `storage` is opaque bytes, filled from its end with as many chunks as fit. Where it is the memory of the weight's
    gradient [V, D], over which backward writes from the start, a chunk lies beyond the gradients of those before it.
    A soft cap keeps none: its slopes would have to be kept beside them.

    `chunks` are all ranges of vocabulary tiles, at most `workspace_bytes` of logits each; `views` has those kept:
    first tile -> (exponentials [N, C], anchors [T, N]). A chunk takes at most an eighth of the storage, so that little
    of it is left over, unless the products would become too narrow for their full rate.
    """

    ALIGNMENT = 16  # bytes, of vector loads
    PARTS, FEWEST_COLUMNS = 8, 4096

    def __init__(
        self, storage: Tensor, hidden: Tensor, vocab: int, block_v: int, softcap: float | None, workspace_bytes: int
    ) -> None:
        rows, itemsize = hidden.shape[0], hidden.element_size()
        self.vocab, self.block_v = vocab, block_v
        self.bytes = storage.view(-1).view(torch.uint8)
        end = self.bytes.numel() // self.ALIGNMENT * self.ALIGNMENT if softcap is None else 0
        most, part = workspace_bytes or WORKSPACE_BYTES, end // self.PARTS
        if part >= rows * self.FEWEST_COLUMNS * itemsize:
            most = min(most, part)
        tiles_v, size = triton.cdiv(vocab, block_v), _tiles_per_chunk(rows, itemsize, block_v, most)
        self.chunks = [range(i, min(i + size, tiles_v)) for i in range(0, tiles_v if rows else 0, size)]

        gradient_row = storage.shape[1] * storage.element_size() if storage.dim() == 2 else 0
        self.views, self.unused = {}, [(end, self.bytes.numel())]
        for tiles in reversed(self.chunks):
            tile_bytes, anchor_bytes = rows * self.width(tiles) * itemsize, rows * len(tiles) * 4
            middle = end - self._aligned(anchor_bytes)
            start = middle - self._aligned(tile_bytes)
            if start >= tiles.start * block_v * gradient_row:
                tile_NC = self.bytes[start : start + tile_bytes].view(hidden.dtype).view(rows, self.width(tiles))
                anchor_TN = self.bytes[middle : middle + anchor_bytes].view(torch.float32).view(len(tiles), rows)
                self.views[tiles.start] = tile_NC, anchor_TN
                self.unused += [(start + tile_bytes, middle), (middle + anchor_bytes, end)]
                end = start
        self.unused.append((0, end))

    def _aligned(self, size: int) -> int:
        return triton.cdiv(size, self.ALIGNMENT) * self.ALIGNMENT

    def width(self, tiles: range) -> int:
        """Columns of the vocabulary in those tiles."""
        return min(tiles.stop * self.block_v, self.vocab) - tiles.start * self.block_v

    def zero_the_rest(self) -> None:
        for start, stop in self.unused:
            if start < stop:
                self.bytes[start:stop] = 0
