"""Check that the model predicts each token of an answer from earlier tokens only. If not, it learns to copy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cwdpo_kernels import IGNORE_INDEX, Head, linear_logprob
from cwdpo_kernels.integrations.hugging_face import evaluating
from cwdpo_trainer.errors import InputError


@torch.no_grad()
def check_causal(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> float:
    """Check that log-probs of answers stay the same when the last token of each answer changes.

    Args:
        model: takes `head_op`
        inputs: S rows, padded on the right
        labels: [S, T], aligned with the hidden states that predict them

    Returns the largest change, in nats. Raises `InputError` if it exceeds rounding, which means that the model attends
    in both directions: with token types that it takes for those of a prompt, for example.
    """

    def op(hidden: Tensor, head: Head) -> tuple[Tensor, torch.dtype]:
        return linear_logprob(hidden, head, labels), hidden.dtype

    changed = dict(inputs, input_ids=_change_last_tokens(inputs["input_ids"], labels))
    with evaluating(model):
        (logp, dtype), (other, _) = (model(**batch, head_op=op) for batch in (inputs, changed))
    worst = (logp - other).abs().max().item()
    tolerance = max(1e-4, 4 * torch.finfo(dtype).eps * logp.abs().max().item())
    if not worst <= tolerance:
        expected = f"a change <= {tolerance:.1e} nats when only a later token changes"
        got = f"{worst:.3g}: the model attends to later tokens of an answer"
        raise InputError(type(model).__name__, "log-probs of answers", expected, got)
    return worst


def _change_last_tokens(ids: Tensor, labels: Tensor) -> Tensor:
    """Replace the last token of each answer by the answer's first token.

    The last token is the label of the row's last labeled position, so it lies one further right. No label is predicted
    from it.
    """
    ids = ids.clone()
    for row, labeled in enumerate(labels != IGNORE_INDEX):
        positions = labeled.nonzero().flatten().tolist()
        if positions:
            ids[row, positions[-1] + 1] = labels[row, positions[0]]
    return ids
