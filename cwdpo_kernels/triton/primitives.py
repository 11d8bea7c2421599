"""Device functions that the kernels share: anchored exponentials, the logits of a tile, the order of tiles.

**Anchors.** The kernels carry a sum of exponentials as two numbers, (anchor, sum_exp):

    sum_exp = sum_v exp(z_v - anchor ln 2)

The anchor is in units of ln 2: an integer, stored as a float, equal to or just above max_v z_v / ln 2. So no
exponential overflows, however large the logits are. Changing the anchor of a sum, or of a tile of exponentials in
bfloat16, multiplies it by a power of two, which is exact. If the anchor stays the same, nothing has to be done. So a
bfloat16 tile, which has the exponent range of float32, keeps the anchor of the tiles before it unless its own is more
than HEADROOM above that. Its exponentials are then up to 2^HEADROOM instead of 1.

Comparisons, tl.maximum and tl.max drop NaN on a GPU. So NaN travels in sum_exp only: anchors are never NaN. A sum with
a logit of +inf, or above 7.4e8 (MAX_ANCHOR), is NaN.

For large |z| the product anchor * ln 2 needs more digits than float32 has (at 1e4 the error would be 6e-4). So ln 2 is
split into LN2_HI + LN2_LO, where anchor * LN2_HI is exact for |anchor| < 2^14.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LN2_HI = tl.constexpr(0.693359375)  # 355 / 512
LN2_LO = tl.constexpr(-2.1219444005469057e-4)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# The interpreter (TRITON_INTERPRET=1) multiplies the raw bits of bfloat16 operands in tl.dot, and truncates when it
# converts to bfloat16. `operand` and `rounded` correct that, so that it computes what a GPU computes.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Anchors stay within +-MAX_ANCHOR: beyond 2^31 the distance between floats exceeds the range of an exponential.
MAX_ANCHOR = tl.constexpr(1073741824.0)  # 2^30, a logit of 7.4e8
NO_ANCHOR = tl.constexpr(-1073741824.0)  # of an empty sum
# 28 nats. Sums over a vocabulary stay far from overflow, and exponents keep as many digits as the logits have: anchors
# belong to logits of the same token.
HEADROOM = tl.constexpr(40.0)
NEGLIGIBLE = tl.constexpr(1e3)  # exp2(-NEGLIGIBLE) is 0. Exponents are cut off here, because 0 * -inf would be NaN.


@triton.jit
def anchor_of(max_logit):
    """The anchor of logits with maximum `max_logit`; NO_ANCHOR if that is -inf (no logits) or NaN."""
    anchor = tl.ceil(max_logit * LOG2E)
    return tl.where(anchor > NO_ANCHOR, tl.minimum(anchor, MAX_ANCHOR), NO_ANCHOR)


@triton.jit
def or_nan(sum_exp, max_logit):
    """The sum of exponentials, or NaN if a logit is +inf or too large for an anchor."""
    return tl.where(max_logit * LOG2E > MAX_ANCHOR, float("nan"), sum_exp)


@triton.jit
def log2_anchored(z, anchor):
    """(z - anchor ln 2) / ln 2."""
    return (z - anchor * LN2_HI) * LOG2E - anchor * (LN2_LO * LOG2E)


@triton.jit
def exp_anchored(z, anchor):
    """exp(z - anchor ln 2): at most 1, up to rounding, if z <= anchor ln 2."""
    return tl.exp2(log2_anchored(z, anchor))


@triton.jit
def merge(anchor_a, sum_exp_a, anchor_b, sum_exp_b):
    """(anchor, sum_exp) of the sum of two anchored sums."""
    anchor = tl.maximum(anchor_a, anchor_b)
    return anchor, sum_exp_a * tl.exp2(anchor_a - anchor) + sum_exp_b * tl.exp2(anchor_b - anchor)


@triton.jit
def log1p(x):
    """log1p(x) for x >= 0 with full relative accuracy: tl.log(1 + x) loses it when x is small.

    Below 1/2 it uses the series of 2 atanh(x / (2 + x)), whose argument is then at most 1/5.
    """
    t = x / (2.0 + x)
    s = t * t
    series = 2.0 * t * (1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s / 11)))))
    return tl.where(x < 0.5, series, tl.log(1.0 + x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) with full relative accuracy for any x, +-inf included; NaN for NaN, through log1p."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); the exponential never overflows."""
    decay = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, decay) / (1.0 + decay)


@triton.jit
def logp_of(target, anchor, sum_exp):
    """The label's log-prob -log1p(s), where s = exp(anchor ln 2 - target) * sum_exp is the odds against it.

    `target` is the label's logit. The result is NaN if a logit is NaN or +inf, if all are -inf, and if all are below
    every anchor, where the competitors' sum is lost.
    """
    log_odds = (anchor * LN2_HI - target) + (tl.log(sum_exp) + anchor * LN2_LO)
    known = (target < float("inf")) & ((sum_exp != 0) | (target > NO_ANCHOR * LN2))
    return tl.where(known, -softplus(log_odds), float("nan"))


def logit_gradient(
    grad_logp: Tensor, labels: Tensor, logp: Tensor, sum_exp: Tensor, ignore_index: int, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(grad_target, exp_factor) [N]: d loss / d z is grad_target at the label and exp_factor * u_v elsewhere.

    grad_target = grad_logp * (1 - p_y) * scale, with 1 - p_y = -expm1(logp); both are 0 where ignored. Without
    competitors (V = 1, or all of them at -inf) they are 0, too.
    """
    grad_target = torch.where((labels != ignore_index) & (grad_logp != 0), grad_logp * -torch.expm1(logp) * scale, 0.0)
    return grad_target, torch.where(grad_target == 0, 0.0, -grad_target / sum_exp)


@triton.jit
def tile_position(tile, tiles_n, tiles_v, GROUP_N: tl.constexpr):
    """(row block, vocabulary block) of a tile index. GROUP_N row blocks in a row share each vocabulary block in L2."""
    tiles_per_group = GROUP_N * tiles_v
    first_n = tile // tiles_per_group * GROUP_N
    group_n = tl.minimum(tiles_n - first_n, GROUP_N)
    return first_n + tile % group_n, tile % tiles_per_group // group_n


@triton.jit
def operand(tile):
    """A tile, ready for tl.dot (see INTERPRETED)."""
    if INTERPRETED and tile.dtype == tl.bfloat16:
        return tile.to(tl.float32)
    else:
        return tile


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 rounded to the nearest value of `dtype` (see INTERPRETED)."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), float("nan"))
    return x.to(dtype)


@triton.jit
def load_tile(
    matrix, row, col, end_row, end_col, stride_row, stride_col,
    BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """A tile of a matrix, 0 outside it. Loads with a tensor descriptor (TMA), or with pointers for any layout."""
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
    """softcap(scale * (hidden @ weight.T + bias)) [BLOCK_N, BLOCK_V] in float32; `scale` None for 1.

    With D = 0 there is no product.
    """
    z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        hidden_tile = load_tile(hidden, row, d, N, D, stride_hidden_n, stride_hidden_d, BLOCK_N, BLOCK_D, DESCRIPTORS)
        weight_tile = load_tile(weight, col, d, V, D, stride_weight_v, stride_weight_d, BLOCK_V, BLOCK_D, DESCRIPTORS)
        z = tl.dot(hidden_tile, weight_tile.T, z, input_precision=PRECISION)
    if HAS_BIAS:
        offs_v = col + tl.arange(0, BLOCK_V)
        z += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
    if scale is not None:
        z *= scale
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1) has the right limits when exp overflows or underflows. It cancels near 0.
        x = z / softcap
        series = x * (1.0 - x * x * (1 / 3 - x * x * (2 / 15 - x * x * (17 / 315))))
        z = softcap * tl.where(tl.abs(x) < 0.25, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))
    return z


@triton.jit
def slope_of(z, softcap):
    """d softcap(x) / dx at softcap(x) = z."""
    return 1.0 - (z / softcap) * (z / softcap)
