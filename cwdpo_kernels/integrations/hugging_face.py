"""Hugging Face models: call the output head instead of reading its weight.

`attach_head(model)` adds the argument `head_op` to a model's forward. The forward then calls this function with its
hidden states and its head, and returns the result:

    attach_head(model)
    loss = model(**inputs, head_op=lambda hidden, head: linear_cwdpo_loss(hidden, head, labels, ...).loss)

The call runs inside the forward of the head module, which runs inside the forward of the (wrapped) model. Therefore the
hooks of DDP, FSDP and ZeRO fire, which gather weights and reduce gradients. Reading `lm_head.weight` from outside skips
them, and the head's gradient is then silently wrong.

The transform of the logits after the head (scale, soft cap) is measured, not read from the config; see
head_transform.py. Peft may wrap the model before or after the call; see lora_head.py for LoRA on the head.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .. import Head, linear_logprob
from . import lora_head
from .head_transform import Transform, measure_transform, stubbed
from .module_types import LanguageModel, is_language_model, is_peft_model, unwrapped

__all__ = [
    "HeadError",
    "HeadInfo",
    "attach_head",
    "attach_head_unmeasured",
    "call_head",
    "check_head",
    "evaluating",
    "rounding_tolerance",
]

HeadOp = Callable[[Tensor, Head], Any]
# Attributes set on modules.
_INFO, _PREVIOUS, _TAKES_OP = "_cwdpo_head_info", "_cwdpo_previous_forward", "_cwdpo_takes_op"


class HeadError(ValueError):
    """The model's head cannot be fused, or the fused log-probs differ from the model's own."""


@dataclass(frozen=True)
class HeadInfo:
    """What `attach_head` found: the head, the transform of its logits, and `difference`.

    `difference` is the largest distance, in nats, between fused log-probs of random tokens and those of the model's own
    logits.
    """

    model: str
    vocab: int
    dim: int
    dtype: torch.dtype
    bias: bool
    transform: Transform
    difference: float

    def __str__(self) -> str:
        bias = "bias" if self.bias else "no bias"
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.model}: head {self.vocab} x {self.dim}, {dtype}, {bias}, {self.transform}; "
            f"fused log-probs within {self.difference:.1e} nats of the model's own"
        )


def attach_head(model: nn.Module, *, head_casts: bool = False) -> HeadInfo:
    """Add the argument `head_op` to the forward of `model`. Without that argument the forward does what it did before.

    `model` is a `transformers.PreTrainedModel` with a backbone and an output head, or a peft model of one. The patched
    forwards are bound methods, so a `copy.deepcopy(model)` calls its own head; `save_pretrained` and `generate` see the
    same signatures as before. A second call returns the result of the first.

    head_casts: the head's forward may be patched, to cast hidden states to the dtype of its weight and multiply. Calls
        without `head_op` still run it.

    Raises `HeadError` if the head is not linear, if a forward is patched already, or if the logits are not
    softcap(scale * (hidden W^T + b)). The model is then unchanged.
    """
    model = model.get_base_model() if is_peft_model(model) else model
    if _INFO in vars(model):
        if head_casts and is_language_model(model):
            _forget_replaced(_output_head(model))
        return vars(model)[_INFO]
    name = type(model).__name__
    model, head, layers = _patchable(model, head_casts)
    try:
        transform = measure_transform(model, head)
        _take_op(layers)
        _patch(model, _with_head_op(type(model).forward, transform))
        info = _compare(model, head, transform, head_casts)
    except ValueError as error:
        for module in (model, *layers):
            _restore(module)
        raise error if isinstance(error, HeadError) else HeadError(f"attach_head: {name}: {error}") from error
    setattr(model, _INFO, info)
    return info


def attach_head_unmeasured(model: nn.Module) -> None:
    """`attach_head` for a model whose weights have no content: on the meta device, or fake tensors.

    Nothing can be measured then. The logits are taken for hidden W^T + b, so log-probs may be wrong; shapes, dtypes and
    memory are right. Raises `HeadError` as `attach_head` does about the model's layers.
    """
    model = model.get_base_model() if is_peft_model(model) else model
    model, _, layers = _patchable(model)
    _take_op(layers)
    _patch(model, _with_head_op(type(model).forward, Transform()))


def _patchable(model: nn.Module, head_casts: bool = False) -> tuple[LanguageModel, nn.Module, list[nn.Module]]:
    """The model, its head and the head's linear layers. `head_casts`: the head itself may be patched."""
    name = type(model).__name__
    if not is_language_model(model):
        _fail(name, "an output head", "no get_output_embeddings()")
    head = _output_head(model)
    _expect(model.base_model is not model, name, "a backbone below the head", "none (base_model is the model itself)")
    layers = _layers(name, head)
    for module in (model, *layers):
        may_patch = _may_patch(module) or (head_casts and module is head)
        _expect(may_patch, name, "forwards that are not patched", f"a patched {type(module).__name__}.forward")
    return model, head, layers


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` and its submodules in evaluation mode; afterwards restore each module's own mode, even on errors.

    `model.train(was_training)` is not enough: it sets all submodules to one mode, including those that were frozen in
    evaluation mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _fail(model: str, expected: str, actual: str) -> NoReturn:
    raise HeadError(f"attach_head: expected {model} to have {expected}, got {actual}")


def _expect(condition: bool, model: str, expected: str, actual: str) -> None:
    if not condition:
        _fail(model, expected, actual)


def _output_head(model: LanguageModel) -> nn.Module:
    head = model.get_output_embeddings()
    if head is None:
        _fail(type(model).__name__, "an output head", "None from get_output_embeddings()")
    return head


def _layers(model: str, head: nn.Module) -> list[nn.Module]:
    layers = lora_head.linear_layers(head)
    expected = "a linear output head with floating-point weights, or LoRA on one"
    _expect(len(layers) > 0, model, expected, type(head).__name__)
    return layers


def _take_op(layers: list[nn.Module]) -> None:
    """Add the argument `op` to those of a head's layers that lack it. Peft may have replaced layers since."""
    for layer in layers:
        if not getattr(layer, _TAKES_OP, False):  # torch 2.11 cannot compile a look at the method itself
            _patch(layer, _head_forward)
            vars(layer)[_TAKES_OP] = True


def _forget_replaced(head: nn.Module) -> None:
    """Let `_take_op` patch the head again if someone has replaced its forward since."""
    if getattr(vars(head).get("forward"), "__func__", None) is not _head_forward:
        vars(head).pop(_TAKES_OP, None)


def _may_patch(module: nn.Module) -> bool:
    # accelerate's hooks (of a quantized model, say) also patch forward. Calls without `head_op` still run them.
    return "forward" not in vars(module) or hasattr(module, "_hf_hook")


def _patch(module: nn.Module, forward: Callable[..., Any]) -> None:
    if "forward" in vars(module):
        vars(module)[_PREVIOUS] = module.forward
    module.forward = MethodType(forward, module)


def _restore(module: nn.Module) -> None:
    vars(module).pop("forward", None)
    vars(module).pop(_TAKES_OP, None)
    if _PREVIOUS in vars(module):
        module.forward = vars(module).pop(_PREVIOUS)


def _plain_forward(module: nn.Module) -> Callable[..., Any]:
    return vars(module).get(_PREVIOUS) or MethodType(type(module).forward, module)


def _head_forward(self: nn.Module, hidden: Tensor, *args: Any, op: HeadOp | None = None, **kwargs: Any) -> Any:
    if op is None:
        return _plain_forward(self)(hidden, *args, **kwargs)
    return op(*lora_head.head_of(self, hidden))


def _with_head_op(plain: Callable[..., Any], transform: Transform) -> Callable[..., Any]:
    """A model's forward with the argument `head_op`. It keeps the signature of `plain`, which `generate` inspects."""

    @functools.wraps(plain)
    def forward(self: LanguageModel, *args: Any, head_op: HeadOp | None = None, **kwargs: Any) -> Any:
        if head_op is None:
            return _plain_forward(self)(*args, **kwargs)
        # Peft's wrappers pass options that the caller did not give as None.
        given = {key: value for key, value in kwargs.items() if value is not None}
        hidden = self.base_model(*args, **given, use_cache=False).last_hidden_state
        return call_head(self, hidden, head_op, transform)

    return forward


def call_head(model: LanguageModel, hidden: Tensor, head_op: HeadOp, transform: Transform) -> Any:
    """`head_op` of `hidden` and the head of an attached model, inside the forward of the head module.

    Call it inside the forward of `model`.
    """
    head = _output_head(model)
    _take_op(_layers(type(model).__name__, head))

    def op(hidden: Tensor, head: Head) -> Any:
        return head_op(hidden, dataclasses.replace(head, scale=transform.scale, softcap=transform.softcap))

    return head(hidden, op=op)


@torch.no_grad()
def _compare(model: LanguageModel, head: nn.Module, transform: Transform, head_casts: bool) -> HeadInfo:
    """Compare fused log-probs of random tokens with those of the model's logits, over a stubbed backbone."""
    found: dict[str, Any] = {}
    with stubbed(model, head) as (hidden, inputs), evaluating(model):
        generator = torch.Generator("cpu").manual_seed(2)
        labels = torch.randint(0, 2**31, hidden.shape[:-1], generator=generator, device="cpu")

        def op(hidden: Tensor, head: Head) -> Tensor:
            weight = head.weight
            found.update(vocab=weight.shape[0], dim=weight.shape[1], dtype=weight.dtype, bias=head.bias is not None)
            found["labels"] = (labels % weight.shape[0]).to(weight.device)
            hidden = hidden.to(weight.dtype) if head_casts else hidden
            return linear_logprob(hidden, head, found["labels"])

        fused = model(**inputs, head_op=op)
        own = model(**inputs).logits
    difference = _difference(type(model).__name__, fused, own, found.pop("labels"), found["dtype"])
    return HeadInfo(type(model).__name__, **found, transform=transform, difference=difference)


def rounding_tolerance(largest: float, dtype: torch.dtype) -> float:
    """By how many nats log-probs may differ that are equal but for rounding: 1e-4, or 4 eps `largest` if that is more.

    `largest`: the size of the largest logit or log-prob. `dtype`: that of the hidden states.
    """
    return max(1e-4, 4 * torch.finfo(dtype).eps * largest)


def _difference(name: str, fused: Tensor, own: Tensor, labels: Tensor, dtype: torch.dtype) -> float:
    """The largest difference between fused log-probs and those of the model's own logits, in nats.

    Two log-probs of -inf (a masked vocabulary entry) are equal. `HeadError` if the model's log-probs are NaN, or if the
    difference exceeds 1e-4, or the rounding of the logits if their dtype is shorter than float32.
    """
    mask = labels >= 0
    own, fused = own[mask].float(), fused[mask]
    expected = own.log_softmax(-1).gather(-1, labels[mask].unsqueeze(-1)).squeeze(-1)
    if torch.isnan(expected).any():
        raise HeadError(f"{name}: expected logits to have values finite or -inf, got NaN or +inf: check the weights")
    worst = torch.where(expected == fused, 0.0, (expected - fused).abs()).max().item()
    largest = own.abs().masked_fill(own == -torch.inf, 0.0).max().item()
    tolerance = rounding_tolerance(largest, dtype)
    if not worst <= tolerance:
        raise HeadError(
            f"{name}: expected log-probs from the head's weights to have a difference <= {tolerance:.1e} nats "
            f"from those of the model's own logits, got {worst:.3g}: this model changes its logits after the head"
        )
    return worst


@torch.no_grad()
def check_head(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> float:
    """The largest difference, in nats, between fused log-probs of `labels` [S, T] and those of the model's own logits.

    `attach_head` compares them over a stubbed backbone; this function uses one batch and the real model with its
    wrappers. Raises `HeadError` if they differ by more than 1e-4 nats, or by more than the rounding of the logits if
    their dtype is shorter than float32. If the model can, it projects only the positions from the first label on.
    """
    first = int((labels >= 0).any(dim=0).int().argmax())
    keep = labels.shape[1] - first
    inner = unwrapped(model)
    accepts_keep = "logits_to_keep" in inspect.signature(inner.forward).parameters
    options = {"use_cache": False, **({"logits_to_keep": keep} if accepts_keep else {})}

    def op(hidden: Tensor, head: Head) -> tuple[Tensor, torch.dtype]:
        return linear_logprob(hidden, head, labels), hidden.dtype

    with evaluating(model):
        fused, dtype = model(**inputs, head_op=op)
        own = model(**inputs, **options).logits[:, -keep:]
    return _difference(type(inner).__name__, fused[:, first:], own, labels[:, first:], dtype)
