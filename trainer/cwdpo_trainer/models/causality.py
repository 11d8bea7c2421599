"""An answer's tokens are predicted from what comes before them, or training learns to copy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cwdpo_kernels import Head, linear_logprob
from cwdpo_trainer.errors import InputError


@torch.no_grad()
def check_causal(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> float:
    """Log-probs of the answers do not change when the last token of each does, which no label's prediction may see.

    `inputs` of S rows padded on the right, `labels` [S, T] aligned with the hidden states that predict them; `model`
    takes `head_op`. Returns the largest change, in nats. Raises `InputError` where it is more than rounding: where
    the model attends to both sides, as with token types that it takes for those of a prompt.
    """

    def op(hidden: Tensor, head: Head) -> tuple[Tensor, torch.dtype]:
        return linear_logprob(hidden, head, labels), hidden.dtype

    changed = dict(inputs, input_ids=_with_other_ends(inputs["input_ids"], labels))
    training = [module for module in model.modules() if module.training]
    model.eval()
    (logp, dtype), (other, _) = (model(**batch, head_op=op) for batch in (inputs, changed))
    for module in training:
        module.training = True
    worst = (logp - other).abs().max().item()
    tolerance = max(1e-4, 4 * torch.finfo(dtype).eps * logp.abs().max().item())
    if not worst <= tolerance:
        expected = f"a change <= {tolerance:.1e} nats when only a later token changes"
        got = f"{worst:.3g}: the model attends to later tokens of an answer"
        raise InputError(type(model).__name__, "log-probs of answers", expected, got)
    return worst


def _with_other_ends(ids: Tensor, labels: Tensor) -> Tensor:
    """The last token of each answer (the label of its last labelled state) replaced by the answer's first one."""
    ids = ids.clone()
    for row, of_row in enumerate(labels >= 0):
        labelled = of_row.nonzero().flatten().tolist()
        if labelled:
            ids[row, labelled[-1] + 1] = labels[row, labelled[0]]
    return ids
