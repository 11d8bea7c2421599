"""linear_logprob from full logits."""

import torch
from torch import Tensor

from ..types import IGNORE_INDEX, Head
from .logits_logprob import logits_logprob


def head_logits(hidden: Tensor, head: Head) -> Tensor:
    """[..., V] in the dtype of `hidden`: softcap(scale * (hidden @ weight.T + bias))."""
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def linear_logprob(hidden: Tensor, head: Head, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    return logits_logprob(head_logits(hidden, head), labels, ignore_index)
