"""Our head in TRL's own trainers (1.16): SFT, DPO, KTO, GRPO and RLOO, and every loss that they compute.

TRL's trainers give their models a fused head, `trl.trainer.utils.add_fused_lm_head`, and compute all losses from what
it returns: log-probs, entropies and a few statistics per token. `use_fused_head()` replaces that function by ours:

    use_fused_head()
    DPOTrainer(model, args=DPOConfig(loss_type="hinge"), train_dataset=pairs).train()

The replacement has TRL's arguments and returns its `FusedCausalLMOutput`. It differs from TRL's in three ways. Logits
are never rounded below float32. The head is called inside the model's forward instead of reading its weight, so that
the hooks of FSDP and DDP fire. The transform of the logits (scale, soft cap) is measured instead of read from the
config (see `attach_head`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from .. import Head, linear_logprob, token_stats
from ..validation import check_flag, check_positive, expect
from .head_transform import Transform
from .hugging_face import HeadError, attach_head, call_head
from .module_types import is_peft_model

__all__ = ["use_fused_head"]

KNOWN, UNKNOWN = "1.16", "1.17"  # the first TRL version that works, and the first after those
OP, NAME = "use_fused_head", "add_fused_lm_head"
# Fields of FusedCausalLMOutput -> fields of TokenStats.
PER_TOKEN = {
    "log_probs": "logp", "entropy": "entropy", "log_sum_sq_probs": "log_sum_sq_probs", "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}  # fmt: skip
# Attributes set on models: their own forward, and an _EntropyGrad.
_UNFUSED, _ENTROPY_GRAD = "_cwdpo_unfused_forward", "_cwdpo_entropy_grad"
IGNORED = -100

_replaced: list[Callable[..., None]] = []  # TRL's own function while ours is in its place
_users = 0


def use_fused_head() -> contextlib.ExitStack:
    """Give every TRL trainer that is made from now on our head instead of TRL's.

    SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer, RLOOTrainer and `trl.experimental`'s AsyncGRPOTrainer call
    `add_fused_lm_head` in their constructors. This function replaces it in every module that has imported it, and in
    `trl.trainer.utils`, from where other modules import it later. Use it as a call, for good, or in a `with` statement:

        with use_fused_head():
            trainer = GRPOTrainer(...)
        trainer.train()  # with our head

    Leaving the context, or `close()` on the result, puts TRL's function back. Trainers keep the head that they were
    made with. Contexts may be nested; the outermost one restores.

    Log-probs alone come from `linear_logprob`, and with other fields from `token_stats`. A frozen head takes one pass
    over the vocabulary for them and the gradient of the log-probs. Only GRPO with an entropy bonus also needs the
    entropy's gradient. The first step that has one takes two more products; the steps after it compute both gradients
    in one pass (see `token_stats`, `expect_entropy_grad`).

    NotImplementedError: the version of TRL is not known (>= 1.16 and < 1.17). In the trainer's constructor, HeadError:
    the model's head is not supported (see `attach_head`); it never falls back to TRL's head.
    """
    global _users
    utils = _known_utils()
    stack = contextlib.ExitStack()
    if not _users:
        _replaced.append(utils.add_fused_lm_head)
        _put(_replaced[0], _replacement)
    _users += 1
    stack.callback(_leave)
    return stack


def _leave() -> None:
    global _users
    _users -= 1
    if not _users:
        _put(_replacement, _replaced.pop())


def _replacement(*args: Any, **options: Any) -> None:
    """What stands in for TRL's function: another object than ours, which modules may import for themselves."""
    add_fused_lm_head(*args, **options)


def _known_utils() -> Any:
    """`trl.trainer.utils` of a version whose trainers are known to work with our head."""
    version = importlib.metadata.version("trl")
    if not Version(KNOWN) <= Version(version) < Version(UNKNOWN):
        raise NotImplementedError(
            f"{OP}: expected trl to have version >= {KNOWN} and < {UNKNOWN}, got {version}. Install a known version: "
            f"pip install 'trl>={KNOWN},<{UNKNOWN}'. Without {OP}, the trainers use TRL's own head"
        )
    import trl.trainer.utils

    return trl.trainer.utils


def _put(old: Callable[..., None], new: Callable[..., None]) -> None:
    """Replace `old` in all loaded modules that have imported it by its name."""
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})  # a lazy module would import on getattr(module, NAME)
        if names.get(NAME) is old:
            names[NAME] = new


@dataclass(frozen=True)
class _Fused:
    """The arguments of `add_fused_lm_head`, and the transform of the model's logits divided by the temperature."""

    transform: Transform
    in_float32: bool
    outputs: tuple[str, ...]
    result: type  # TRL's FusedCausalLMOutput


class _EntropyGrad:
    """Whether the entropies of a model get gradients, learned from the backward passes so far."""

    def __init__(self) -> None:
        self.seen = self.expected = False

    def is_expected(self) -> bool:
        """Changes outside of backward only: what checkpointing runs again there must save what forward has saved."""
        if torch.compiler.is_compiling():
            return True  # has no effect there
        in_backward = torch._C._current_graph_task_id() != -1
        if self.seen and not in_backward:
            self.expected = True
        return self.expected

    def watch(self, entropy: Tensor) -> None:
        """Note a gradient of `entropy` when it arrives."""
        if entropy.requires_grad and not self.seen and not torch.compiler.is_compiling():
            entropy.register_hook(self._note)

    def _note(self, grad: Tensor) -> None:
        self.seen = True


def add_fused_lm_head(
    model: nn.Module, temperature: float = 1.0, cast_lm_head_to_fp32: bool = False,
    outputs: Iterable[str] = ("log_probs",),
) -> None:  # fmt: skip
    """TRL's function of this name: `model(..., labels=labels, fused_lm_head=True)` returns a `FusedCausalLMOutput`.

    temperature: the logits are divided by it. cast_lm_head_to_fp32: hidden states and head are cast to float32, also
    under autocast. outputs: the per-token fields to compute, of `PER_TOKEN`; `log_probs` and the loss are always
    computed, other fields are None. A second call replaces the arguments of the first.

    Fields have the shape of `labels[:, 1:]`, or of `shift_labels`, which are already aligned with the hidden states.
    They are 0 where the label is -100. Without `fused_lm_head`, the forward is the model's own.

    ValueError: wrong arguments. HeadError: the head is not supported (see `attach_head`).
    """
    check_positive(NAME, "temperature", temperature)
    check_flag(NAME, "cast_lm_head_to_fp32", cast_lm_head_to_fp32)
    names = tuple(outputs)
    known = ", ".join(PER_TOKEN)
    expect(set(names) <= PER_TOKEN.keys(), NAME, "outputs", "names of", known, names)
    model = model.get_base_model() if is_peft_model(model) else model
    try:
        measured = attach_head(model, head_casts=cast_lm_head_to_fp32).transform
    except HeadError as error:
        raise HeadError(f"{error}. To train this model with TRL's own head, make the trainer without {OP}") from error
    transform = Transform(
        measured.scale / temperature, None if measured.softcap is None else measured.softcap / temperature
    )
    vars(model).setdefault(_UNFUSED, model.forward)
    vars(model)[_ENTROPY_GRAD] = _EntropyGrad()
    fused = _Fused(transform, cast_lm_head_to_fp32, names, _known_utils().FusedCausalLMOutput)
    forward = _fused_forward(type(model).forward, fused)
    model.forward = MethodType(forward, model)


def _fused_forward(plain: Callable[..., Any], fused: _Fused) -> Callable[..., Any]:
    """A model's forward with the argument `fused_lm_head`. It keeps the signature of `plain`, for `generate`."""

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return vars(self)[_UNFUSED](*args, **kwargs)
        labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        if labels is None and shift_labels is None:
            raise TypeError(f"{type(self).__name__}: expected fused_lm_head=True to come with labels, got None")
        num_items = kwargs.pop("num_items_in_batch", None)
        config = self.config.get_text_config()
        # Peft's wrappers pass options that the caller did not give as None.
        given = {**{key: value for key, value in kwargs.items() if value is not None}, "use_cache": False}
        if getattr(config, "output_router_logits", False):
            given.setdefault("output_router_logits", True)
        backbone = self.base_model(*args, **given)
        hidden = backbone.last_hidden_state
        if shift_labels is None:
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        fields = _per_token(self, hidden, shift_labels, fused)
        mask = shift_labels.to(fields["log_probs"].device) != IGNORED
        loss = -fields["log_probs"].sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)
        aux_loss = None
        if given.get("output_router_logits"):
            aux_loss = _router_loss(backbone.router_logits, config, given.get("attention_mask"))
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
        return fused.result(loss=loss, **fields, label_mask=mask, aux_loss=aux_loss)

    return forward


def _per_token(model: Any, hidden: Tensor, labels: Tensor, fused: _Fused) -> dict[str, Tensor]:
    """The fields of `FusedCausalLMOutput` for each token, on the device of the head."""

    def op(hidden: Tensor, head: Head) -> dict[str, Tensor]:
        weight = head.weight  # with `device_map`, the head may be on another device than the end of the backbone
        if fused.in_float32:
            head = Head(weight.float(), None if head.bias is None else head.bias.float(), head.scale, head.softcap)
        hidden, targets = hidden.to(weight.device), labels.to(weight.device)
        if set(fused.outputs) <= {"log_probs"}:
            fields = {"log_probs": linear_logprob(hidden, head, targets)}
        else:
            entropy_grad = vars(model)[_ENTROPY_GRAD]
            stats = token_stats(hidden, head, targets, expect_entropy_grad=entropy_grad.is_expected())
            entropy_grad.watch(stats.entropy)
            fields = {name: getattr(stats, PER_TOKEN[name]) for name in ("log_probs", *fused.outputs)}
        # Views would lose FSDP's hooks if the caller changed them in place.
        return {name: field.clone() for name, field in fields.items()}

    if not fused.in_float32:
        return call_head(model, hidden, op, fused.transform)
    with torch.autocast(hidden.device.type, enabled=False):
        return call_head(model, hidden.float(), op, fused.transform)


def _router_loss(router_logits: Any, config: Any, attention_mask: Tensor | None) -> Tensor | int:
    """The load-balancing loss of a mixture of experts, as the models' own forwards compute it."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, attention_mask)
