"""sequence_logprob with a loop over the sequences."""

import torch
from torch import Tensor

from ..types import IGNORE_INDEX, SequenceLogprob


def sequence_logprob(
    token_logp: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None, ignore_index: int = IGNORE_INDEX
) -> SequenceLogprob:
    if cu_seqlens is None:
        rows = list(zip(token_logp, labels, strict=True))
    else:
        lengths = cu_seqlens.diff().tolist()
        rows = list(zip(token_logp.split(lengths), labels.split(lengths), strict=True))
    answers = [logp[label != ignore_index] for logp, label in rows]
    total = torch.stack([answer.sum() for answer in answers])
    mean = torch.stack([answer.sum() / max(answer.numel(), 1) for answer in answers])
    return SequenceLogprob(total, mean, torch.tensor([answer.numel() for answer in answers]))
