"""Arithmetic that every kernel shares: anchored exponentials, the logits of one tile, the order of tiles.

**Anchors.** A sum of exponentials is carried as (anchor, total): total = sum_v exp(z_v - anchor * ln 2), where anchor
is an integer (kept as a float) at or just above the largest z_v / ln 2. Then no exponential overflows, however large
the logits, and moving a partial sum, or a tile of exponentials in bfloat16, to another anchor multiplies it by a
power of two: exact, so it rounds nothing, and it is skipped where the anchor did not move.

exp(z - anchor ln 2) needs the product to more than float32's digits when |z| is large (an error of 6e-4 at 1e4):
ln 2 = LN2_HI + LN2_LO, where anchor * LN2_HI is exact for |anchor| < 2^14.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2_HI = tl.constexpr(0.693359375)  # 355 / 512
LN2_LO = tl.constexpr(-2.1219444005469057e-4)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# The interpreter (TRITON_INTERPRET=1) multiplies the bits of bfloat16 operands, and truncates where a GPU rounds to
# bfloat16: `operand` and `rounded` give it the GPU's arithmetic.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
NO_ANCHOR = tl.constexpr(-1e30)  # of an empty sum: below every anchor, finite so that differences are numbers


@triton.jit
def anchor_of(peak):
    """The anchor of logits whose maximum is `peak` (-inf: of none)."""
    return tl.maximum(tl.ceil(peak * LOG2E), NO_ANCHOR)


@triton.jit
def log2_anchored(z, anchor):
    """(z - anchor ln 2) / ln 2."""
    return (z - anchor * LN2_HI) * LOG2E - anchor * (LN2_LO * LOG2E)


@triton.jit
def exp_anchored(z, anchor):
    """exp(z - anchor ln 2), at most about 1."""
    return tl.exp2(log2_anchored(z, anchor))


@triton.jit
def join(anchor_a, total_a, anchor_b, total_b):
    """(anchor, total) of two sums together."""
    anchor = tl.maximum(anchor_a, anchor_b)
    return anchor, total_a * tl.exp2(anchor_a - anchor) + total_b * tl.exp2(anchor_b - anchor)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 with full relative accuracy, which log(1 + x) loses when x is small.

    2 atanh(x / (2 + x)) as a series below 1/2, where its argument is at most 1/5.
    """
    t = x / (2.0 + x)
    s = t * t
    series = 2.0 * t * (1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s / 11)))))
    return tl.where(x < 0.5, series, tl.log(1.0 + tl.maximum(x, 0.5)))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) for any x, -inf included, with full relative accuracy."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    decay = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, decay) / (1.0 + decay)


@triton.jit
def logp_of(target, anchor, total):
    """-log1p(s), the label's log-probability: s = exp(anchor ln 2 - target) * total, the odds against it.

    NaN where the target is: comparisons would drop it.
    """
    log_odds = (anchor * LN2_HI - target) + (tl.log(total) + anchor * LN2_LO)
    return tl.where(target == target, -softplus(log_odds), target)


@triton.jit
def tile_position(tile, tiles_n, tiles_v, GROUP_N: tl.constexpr):
    """The tile-th tile's (row block, vocabulary block): GROUP_N row blocks share each vocabulary block in the cache."""
    tiles_per_group = GROUP_N * tiles_v
    first_n = tile // tiles_per_group * GROUP_N
    group_n = tl.minimum(tiles_n - first_n, GROUP_N)
    return first_n + tile % group_n, tile % tiles_per_group // group_n


@triton.jit
def operand(tile):
    """A tile as tl.dot takes it."""
    if INTERPRETED and tile.dtype == tl.bfloat16:
        return tile.to(tl.float32)
    else:
        return tile


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 to `dtype`, to the nearest."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def load_tile(
    matrix, row, col, end_row, end_col, stride_row, stride_col,
    BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """[BLOCK_ROW, BLOCK_COL] of a matrix, zeros outside: by tensor descriptor (TMA), or by pointers for any layout."""
    if DESCRIPTOR:
        tile = matrix.load([row, col])
    else:
        rows = row + tl.arange(0, BLOCK_ROW)
        cols = col + tl.arange(0, BLOCK_COL)
        offsets = rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col
        mask = (rows < end_row)[:, None] & (cols < end_col)[None, :]
        tile = tl.load(matrix + offsets, mask=mask, other=0.0)
    return operand(tile)


@triton.jit
def logits_tile(
    hidden, weight, bias_ptr, row, col, N, V, D, stride_hidden_n, stride_hidden_d, stride_weight_v, stride_weight_d,
    scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """softcap(scale * (hidden @ weight.T + bias)) [BLOCK_N, BLOCK_V] in float32. D = 0 skips the product."""
    z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        hidden_tile = load_tile(hidden, row, d, N, D, stride_hidden_n, stride_hidden_d, BLOCK_N, BLOCK_D, DESCRIPTORS)
        weight_tile = load_tile(weight, col, d, V, D, stride_weight_v, stride_weight_d, BLOCK_V, BLOCK_D, DESCRIPTORS)
        z = tl.dot(hidden_tile, weight_tile.T, z, input_precision=PRECISION)
    if HAS_BIAS:
        offs_v = col + tl.arange(0, BLOCK_V)
        z += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
    z *= scale
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1): overflow and underflow of exp give its limits.
        x = z / softcap
        series = x * (1.0 - x * x * (1 / 3 - x * x * (2 / 15 - x * x * (17 / 315))))
        z = softcap * tl.where(tl.abs(x) < 0.25, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))
    return z


@triton.jit
def slope_of(z, softcap):
    """d softcap(x) / dx where softcap(x) = z."""
    return 1.0 - (z / softcap) * (z / softcap)
