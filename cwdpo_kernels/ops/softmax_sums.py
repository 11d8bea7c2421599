"""softmax_sums: sums over the vocabulary from which token_stats follows. The backward ops are those of token_stats.

`sums` [6, N] are defined in portable/softmax_sums.py, in natural units on every backend; `kept` in kept_tiles.py.
`direction` [N, D] (`with_direction`, for frozen heads) is that of linear_logprob: d logp / d h = (1 - p_y) direction.
"""

from __future__ import annotations

from ..portable.softmax_sums import SUMS
from ..portable.tiles import compute_dtype, new_direction
from .kept_tiles import gradients_like, kept_like, other_gradients_like
from .schema import define, register_fake

define(
    "softmax_sums",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float scale, float? softcap, int ignore_index, "
    "bool partial, bool with_direction, SymInt workspace_bytes, SymInt? kept_bytes) "
    "-> (Tensor sums, Tensor direction, Tensor kept)",
)
define(
    "softmax_sums_backward",
    "(Tensor grad_target, Tensor exp_factor, Tensor log_factor, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor labels, Tensor max_logit, Tensor kept, float scale, float? softcap, int ignore_index, bool partial, "
    "bool needs_hidden, bool needs_weight, bool needs_bias, SymInt workspace_bytes) "
    "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
)
define(
    "softmax_sums_backward_",
    "(Tensor grad_target, Tensor exp_factor, Tensor log_factor, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor labels, Tensor max_logit, Tensor(a!) kept, float scale, float? softcap, int ignore_index, bool partial, "
    "bool needs_hidden, bool needs_bias, SymInt workspace_bytes) -> (Tensor grad_hidden, Tensor grad_bias)",
)


@register_fake("softmax_sums")
def _(*, hidden, weight, labels, with_direction, kept_bytes, **_):
    sums = hidden.new_empty((len(SUMS), *labels.shape), dtype=compute_dtype(hidden.dtype))
    return sums, new_direction(hidden, with_direction), kept_like(hidden, weight, kept_bytes)


register_fake("softmax_sums_backward")(gradients_like)
register_fake("softmax_sums_backward_")(other_gradients_like)
