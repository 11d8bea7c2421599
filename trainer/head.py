"""Call the output head instead of reading it.

`attach_head(model)` gives a model the argument `head_op`: with it, the model's forward hands its hidden
states and its own head to that function, and returns what the function returns:

    loss = model(**inputs, head_op=lambda hidden, head: linear_cwdpo_loss(hidden, head, labels, ...)).loss

The call runs inside the forward of the head module, which runs inside the forward of the (wrapped) model. So
the hooks of DDP, FSDP and ZeRO that gather weights and reduce gradients fire. Reading `lm_head.weight` from
outside skips them, and the head's gradient is then wrong without a word.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cwdpo_kernels import Head, linear_logprob
from cwdpo_trainer.errors import InputError

HeadOp = Callable[[Tensor, Head], Any]
_MARK = "_cwdpo_head_attached"


def attach_head(model: PreTrainedModel) -> None:
    """Teach `model` and its head module the argument `head_op`; without it both do what they always did.

    A second call does nothing. The patched forwards are bound methods, so that `copy.deepcopy(model)` calls
    its own head; `save_pretrained` and `generate` see the same signatures as before.
    Raises `InputError` where the head is not a plain linear layer, or where a forward is patched already.
    """
    if getattr(model, _MARK, False):
        return
    head = model.get_output_embeddings()
    # Subclasses may compute something else (adapters, quantised weights): only the plain layer passes.
    plain = type(head) is nn.Linear and head.weight.is_floating_point()
    _expect(plain, "a linear output head with floating-point weights", type(head).__name__)
    for module in (model, head):
        patched = "forward" in vars(module)
        _expect(not patched, "forwards that are not patched", f"a patched {type(module).__name__}.forward")
    _expect(model.base_model is not model, "a backbone below the head", type(model).__name__)
    head.forward = MethodType(_head_forward, head)
    model.forward = MethodType(_with_head_op(type(model).forward), model)
    setattr(model, _MARK, True)


def _expect(condition: bool, expected: str, actual: str) -> None:
    if not condition:
        raise InputError(f"attach_head: expected model to have {expected}, got {actual}")


def _head_forward(self: nn.Module, hidden: Tensor, op: HeadOp | None = None) -> Any:
    if op is None:
        return type(self).forward(self, hidden)
    head, device = Head.of(self), hidden.device.type
    if torch.is_autocast_enabled(device):  # as autocast does for the linear layer that this replaces
        dtype = torch.get_autocast_dtype(device)
        bias = None if head.bias is None else head.bias.to(dtype)
        hidden, head = hidden.to(dtype), dataclasses.replace(head, weight=head.weight.to(dtype), bias=bias)
    return op(hidden, head)


def _with_head_op(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`plain`, an unbound forward, with one more argument; it keeps the signature, which `generate` reads."""

    @functools.wraps(plain)
    def forward(self: PreTrainedModel, *args: Any, head_op: HeadOp | None = None, **kwargs: Any) -> Any:
        if head_op is None:
            return plain(self, *args, **kwargs)
        hidden = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state
        return self.get_output_embeddings()(hidden, op=head_op)

    return forward


@torch.no_grad()
def check_head(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> None:
    """Compare the fused log-probs of `labels` with those of the model's own logits on one batch.

    Models may scale, cap or otherwise change their logits after the head, whatever their configuration says.
    Raises `InputError` with the figures where the two differ by more than 1e-4 nats, or than the rounding of
    logits in a shorter dtype. Projects only the positions from the first label on, where the model can.
    """
    was_training = model.training
    model.eval()
    fused, dtype = model(**inputs, head_op=lambda hidden, head: (linear_logprob(hidden, head, labels), hidden.dtype))
    first = int((labels >= 0).any(dim=0).int().argmax())
    keep = labels.shape[1] - first
    # A wrapper (DDP, FSDP) hides the signature of the model in it.
    inner = getattr(model, "module", model)
    accepts_keep = "logits_to_keep" in inspect.signature(inner.forward).parameters
    own = model(**inputs, use_cache=False, **({"logits_to_keep": keep} if accepts_keep else {})).logits[:, -keep:]
    model.train(was_training)
    answers = labels[:, first:]
    mask = answers >= 0
    expected = own.float().log_softmax(-1).gather(-1, answers.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    worst = (expected - fused[:, first:])[mask].abs().max().item()
    tolerance = max(1e-4, 4 * torch.finfo(dtype).eps * own[mask].abs().max().item())
    if not worst <= tolerance:
        raise InputError(
            f"{type(inner).__name__}: expected log-probs from the head's weights to have a difference "
            f"<= {tolerance:.1e} nats from those of the model's own logits, got {worst:.3g}: "
            "this model changes its logits after the head"
        )
