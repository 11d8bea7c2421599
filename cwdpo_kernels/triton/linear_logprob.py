"""linear_logprob on a GPU: the algebra of portable/linear_logprob.py, one vocabulary chunk at a time.

The competitors of a label y are all v != y. With u_v = exp(z_v - anchor ln 2) and sum_exp = sum u_v over them:

    logp = -log1p(exp(anchor ln 2 - z_y) * sum_exp)
    d logp / d z_y = 1 - p_y,   d logp / d z_v = -(1 - p_y) u_v / sum_exp
    d logp / d h = (1 - p_y) * direction (direction.py)

Floating-point operations, with 1G = 2 N D V, and bytes moved beyond the operands:

    no gradient      1G   one sweep; 16 N T, its partial sums written and read
    frozen head      2G   forward also writes u, a chunk at a time in the dtype of the inputs, and a dense GEMM
                          accumulates sum u_v slope_v W_v in float32; backward scales rows (in ops/). 2 N V tile entries
    trainable head   3G   forward sweeps and keeps tiles of u (kept.py); backward is in gradients.py. 3 N V tile entries
                     4G   for tiles that were not kept, which backward recomputes. 3 N V tile entries

Kept tiles lie in the memory of grad_weight; backward reads each one before it overwrites it. With `sparse_grad`, which
announces tokens without a label or a gradient, blocks of such tokens skip the sweep, the recomputation and both GEMMs.

The kernels never wait for the device and use no atomics, so equal inputs give equal bits.
Legend: N tokens, D hidden, V vocabulary, T vocabulary tiles of BLOCK_V, C vocabulary columns of a chunk of tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .direction import new_direction, sweep_with_direction
from .gradients import LogitGrads, head_gradients
from .kept import KeptChunks
from .primitives import logit_gradient
from .sweep import Sweep


def linear_logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, softcap: float | None,
    ignore_index: int, with_direction: bool, sparse_grad: bool, workspace_bytes: int, kept_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """logp [N], anchor [N], sum_exp [N], direction [N, D] (or empty), kept tiles (opaque bytes or [V, D])."""
    labels = labels.contiguous()
    sweep = Sweep(hidden, weight, bias, labels, scale, softcap, ignore_index, skip_ignored=sparse_grad)
    opaque = kept_bytes is not None and kept_bytes >= 0
    kept = hidden.new_empty(kept_bytes or 0, dtype=torch.uint8) if opaque else torch.empty_like(weight)
    if with_direction:
        return *sweep_with_direction(sweep, workspace_bytes), kept

    kept_chunks = KeptChunks(kept, hidden, sweep.vocab, sweep.config.block_v, softcap, workspace_bytes)
    if kept_bytes is None or kept_bytes >= 0:
        kept_chunks.zero_unused()
    return *kept_chunks.fill(sweep), new_direction(hidden, 0), kept


def linear_logprob_backward(
    grad_logp: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, logp: Tensor,
    anchor: Tensor, sum_exp: Tensor, kept: Tensor, scale: float, softcap: float | None, ignore_index: int,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool, sparse_grad: bool, workspace_bytes: int,
    grad_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden [N, D], weight [V, D] and bias [V] for a trainable head; empty where not needed.

    The gradient of the weight is written to `grad_weight` if that is given.
    """
    grad_target, exp_factor = logit_gradient(grad_logp, labels, logp, sum_exp, ignore_index, scale)
    grads = LogitGrads(anchor, grad_target, exp_factor, sum_exp=sum_exp)
    return head_gradients(
        hidden, weight, bias, labels, grads, kept, scale, softcap, needs_hidden, needs_weight, needs_bias, sparse_grad,
        workspace_bytes, grad_weight,
    )  # fmt: skip


def linear_logprob_backward_(
    grad_logp: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, logp: Tensor,
    anchor: Tensor, sum_exp: Tensor, kept: Tensor, scale: float, softcap: float | None, ignore_index: int,
    needs_hidden: bool, needs_bias: bool, sparse_grad: bool, workspace_bytes: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same, with the gradient of the weight written over `kept` [V, D], which holds the kept tiles."""
    grad_hidden, _, grad_bias = linear_logprob_backward(
        grad_logp, hidden, weight, bias, labels, logp, anchor, sum_exp, kept, scale, softcap, ignore_index,
        needs_hidden, True, needs_bias, sparse_grad, workspace_bytes, grad_weight=kept,
    )  # fmt: skip
    return grad_hidden, grad_bias
