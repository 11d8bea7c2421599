"""Cooling-Weighted DPO in TRL (1.16): its `DPOTrainer` with another loss, without logits, with images and peft.

Before:

    from trl import DPOTrainer
    DPOTrainer(model, args=args, train_dataset=pairs, processing_class=processor).train()

After:

    from cwdpo_kernels.integrations.trl import CoolingDPOTrainer
    CoolingDPOTrainer(model, args=args, train_dataset=pairs, processing_class=processor, cooling=Cooling()).train()
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from typing import Any, cast

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from .. import (
    Cooling,
    CoolingWeighted,
    Head,
    PreferenceLoss,
    PreferenceOutput,
    SequenceLogprob,
    linear_preference_loss,
    linear_sequence_logprob,
    preference_loss,
)
from ..validation import check_choice, check_positive, expect
from .hugging_face import attach_head
from .trl_head import use_fused_head as use_fused_head
from .trl_sharing import OP, Batch, PromptSharing

# Options of DPOConfig that the trainer does not implement, and their values without effect, which it accepts.
ONLY: dict[str, tuple[Any, ...]] = {
    "loss_type": (["sigmoid"],), "loss_weights": (None, [1.0]), "ld_alpha": (None, 1.0), "label_smoothing": (0.0,),
    "use_weighting": (False,), "f_divergence_type": ("reverse_kl",), "padding_free": (False,),
    "use_liger_kernel": (False,), "parallelism_config": (None,),
}  # fmt: skip
# Prompt learning of peft that works. In transformers 5 prefix tuning needs a cache, which training turns off.
PROMPTS = ("PROMPT_TUNING", "P_TUNING")
# What the trainer logs; evaluation adds the prefix "eval_" to it and to what transformers measures.
METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
    "mean_logps/chosen", "mean_logps/rejected", "kept", "cooling_weight", "num_tokens",
)  # fmt: skip
OF_EVALUATION = ("loss", "runtime", "samples_per_second", "steps_per_second")


class CoolingDPOTrainer(DPOTrainer):
    """TRL's DPOTrainer with the loss -log sigmoid(beta * (D_w - w_c * D_l)), D = policy - reference log-prob.

    cooling: defines w_c; `Cooling(constant=1.0)` is DPO as TRL computes it.
    loss: another `PreferenceLoss`, instead of `cooling`. Its `beta` counts; that of `args` has its default or the same
        value. For a loss without a reference no step runs one, though TRL loads it (not for a peft model).
    normalize: "sequence" for D of total log-probs, "token" for D of means. The default is that of the loss.
    prefix_sharing: True encodes the prompt of each pair and its images once for both answers, in the policy and in the
        reference. If the vision path is frozen, policy and reference also share the image features. Losses, metrics and
        gradients stay the same within rounding. On the first batch, log-probs are compared with those of separate rows.
        The default is False.

    Everything else works as TRL documents it: models by name or loaded, datasets with and without images, LoRA and
    prompt tuning, `torch_compile`, and the reference (adapter off, precomputed, `ref_model`, or the policy reloaded by
    name). A policy that has been trained since it was loaded needs `ref_model`.

    `max_length` can leave an answer without tokens. DPO counts such a pair with log-prob 0 for the answer. So does this
    trainer with `constant=1.0`. Otherwise w_c is undefined for the pair, so it is left out of the loss, as it is with
    `loss`. The first such pair causes a warning.

    The head is called inside the model's forward (`attach_head`), so wrappers' hooks fire. It logs TRL's `rewards/*`,
    `logps/*` (sums, nats) and `num_tokens`, and also `cooling_weight` (mean over the kept pairs), `kept` (their share),
    `mean_logps/chosen` and `mean_logps/rejected` (nats per token). It does not log TRL's `entropy`, `logits/*` and
    `mean_token_accuracy`, which would cost another pass over the vocabulary.

    NotImplementedError: options that differ from `ONLY`, prompt learning of peft that differs from `PROMPTS`, router
    losses of mixtures of experts, `compute_metrics` and `predict` (they need logits); with `prefix_sharing`, models
    that cannot share prompts (see `why_no_trees`), `torch_compile` and prompt learning. ValueError: `beta` <= 0, a
    `metric_for_best_model` that evaluation does not measure, a reference for a loss without one, and on the first batch
    a model whose log-probs change with `prefix_sharing`. HeadError: the head is not supported (see `attach_head`).
    """

    model: PreTrainedModel  # or a peft model, which forwards attributes to it; never None after __init__

    def __init__(
        self, model: Any, ref_model: Any = None, args: DPOConfig | None = None, *more: Any,
        cooling: Cooling | None = None, loss: PreferenceLoss | None = None, normalize: str | None = None,
        prefix_sharing: bool | None = None, **options: Any,
    ) -> None:  # fmt: skip
        if loss is None:
            expect(isinstance(cooling, Cooling), OP, "cooling", "type", "Cooling", type(cooling).__name__)
        else:
            _check_loss(loss, cooling, ref_model, args)
        if normalize is not None:
            check_choice(OP, "normalize", normalize, ("sequence", "token"))
        given = inspect.signature(DPOTrainer.__init__).bind(self, model, ref_model, args, *more, **options).arguments
        is_known = prefix_sharing is None or isinstance(prefix_sharing, bool)
        expect(is_known, OP, "prefix_sharing", "value", "True or False", repr(prefix_sharing))
        _check(given)
        self.sharing = PromptSharing(bool(prefix_sharing), given)
        self.loss, self.cooling, self.normalize = loss, cooling, normalize
        self._has_warned_of_empty_answers = False
        super().__init__(model, ref_model, args, *more, **options)
        if self.aux_loss_enabled:
            _refuse("router_aux_loss_coef", self.router_aux_loss_coef, 0.0)

    def __setattr__(self, name: str, value: Any) -> None:
        # Attach here: the model is loaded (by TRL or the caller), but not wrapped by TRL or accelerate yet.
        if name in ("model", "ref_model") and (isinstance(value, PreTrainedModel) or hasattr(value, "get_base_model")):
            attach_head(value)
            self.sharing.enable(value)
        if name == "ref_model" and isinstance(value, OptimizedModule) and self.precompute_ref_logps:
            # TRL's precomputation asks for the truth value of the reference, which a compiled module does not have.
            value = value._orig_mod
        super().__setattr__(name, value)

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Total log-probs of the chosen [P] and the rejected [P] answers under the reference, in nats."""
        return self._reference(model, self.sharing.batch(self.model, inputs))

    def _reference(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        none: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        adapter = checkpointing = none
        if self.ref_model is None:  # the reference is in the policy
            options = self.args.gradient_checkpointing_kwargs
            options = None if isinstance(options, str) else options  # never a string: DPOConfig has parsed it
            checkpointing = disable_gradient_checkpointing(self.model, options)
            if is_peft_model(self.model):
                policy = self.accelerator.unwrap_model(self.model)
                adapter = use_adapter(policy, "ref" if "ref" in policy.peft_config else None)
        with torch.no_grad(), checkpointing, adapter, self.accelerator.autocast():
            self.sharing.check(model, batch, self.accelerator)
            answers = batch.answers
            logp = answers.run(
                model,
                lambda hidden, head: linear_sequence_logprob(hidden, head, answers.labels, answers.cu_seqlens).total,
            )
        chosen, rejected = logp.chunk(2)
        return chosen, rejected

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Tensor:
        if return_outputs:
            raise NotImplementedError(f"{OP}: predict is not supported, because it needs logits")
        batch = self.sharing.batch(self.model, inputs)
        self.sharing.check(model, batch, self.accelerator)
        reference = self.model if self.ref_model is None else self.ref_model
        with self.sharing.images_once(self.model, reference):
            output = self._forward(model, reference, batch, inputs)
        self._record(output, inputs["attention_mask"])
        return output.loss

    def _forward(
        self, model: nn.Module, reference: nn.Module, batch: Batch, inputs: dict[str, Any]
    ) -> PreferenceOutput:
        loss = self.loss or CoolingWeighted(self.beta, cast(Cooling, self.cooling))
        references: tuple[Tensor, ...] = ()
        if self.precompute_ref_logps:
            references = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        elif loss.needs_reference:
            references = self._reference(reference, batch)
        answers, normalize = batch.answers, self.normalize

        def op(hidden: Tensor, head: Head) -> PreferenceOutput:
            labels, cu_seqlens = answers.labels, answers.cu_seqlens
            if isinstance(loss, CoolingWeighted) and loss.cooling.constant == 1.0:
                policy = _counted(linear_sequence_logprob(hidden, head, labels, cu_seqlens))
                return preference_loss(*policy, *references, loss=loss, normalize=normalize)
            return linear_preference_loss(
                hidden, head, labels, *references, loss=loss, normalize=normalize, cu_seqlens=cu_seqlens
            )

        return answers.run(model, op)

    def _record(self, output: PreferenceOutput, attention_mask: Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        metrics = {
            "rewards/chosen": output.chosen_reward, "rewards/rejected": output.rejected_reward,
            "rewards/accuracies": output.accuracy, "rewards/margins": output.margin,
            "logps/chosen": output.chosen_logp.total, "logps/rejected": output.rejected_logp.total,
            "mean_logps/chosen": output.chosen_logp.mean, "mean_logps/rejected": output.rejected_logp.mean,
            "kept": output.kept, "cooling_weight": output.cooling_weight * output.kept,
            "empty": (output.chosen_logp.count == 0) | (output.rejected_logp.count == 0),
        }  # fmt: skip
        table = self.accelerator.gather(torch.stack([metric.float() for metric in metrics.values()], dim=1))
        means = dict(zip(metrics, table.mean(0).tolist(), strict=True))
        self._warn_of_empty_answers(round(means.pop("empty") * len(table)), len(table))
        weight = means.pop("cooling_weight")
        if means["kept"]:  # without a kept pair there is no mean weight
            means["cooling_weight"] = weight / means["kept"]
        for name, mean in means.items():
            self._metrics[mode][name].append(mean)
        if mode == "train":
            self._total_train_tokens += self.accelerator.gather(attention_mask.sum()).sum().item()
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _warn_of_empty_answers(self, empty: int, pairs: int) -> None:
        """Warn at the first batch that has pairs which DPO would count and this trainer leaves out."""
        if empty and not self._has_warned_of_empty_answers:
            self._has_warned_of_empty_answers = True
            max_length = getattr(self.args, "max_length", None)
            warnings.warn(
                f"{OP}: expected answers to have at least 1 token, got {empty} of {pairs} pairs with an empty answer "
                f"in a batch (max_length={max_length}). They are left out of the loss; TRL's DPOTrainer counts them. "
                "Raise max_length, or remove the pairs",
                stacklevel=2,
            )


def _check_loss(loss: Any, cooling: Any, ref_model: Any, args: DPOConfig | None) -> None:
    """Check the argument `loss` together with those that it replaces."""
    expect(isinstance(loss, PreferenceLoss), OP, "loss", "type", "PreferenceLoss", type(loss).__name__)
    expect(cooling is None, OP, "cooling", "value", "None (as loss is given)", type(cooling).__name__)
    kind, beta = type(loss).__name__, DPOConfig.beta if args is None else args.beta
    expect(beta in (DPOConfig.beta, loss.beta), OP, "beta", "value", f"{loss.beta} (as loss has)", beta)
    if loss.needs_reference:
        return
    expect(ref_model is None, OP, "ref_model", "value", f"None ({kind} has no reference)", type(ref_model).__name__)
    for name in ("precompute_ref_log_probs", "sync_ref_model"):
        value = getattr(args, name, False)
        expect(not value, OP, name, "value", f"False ({kind} has no reference)", value)


def _check(given: dict[str, Any]) -> None:
    """Check the arguments of `DPOTrainer` that are known before it loads models and precomputes log-probs."""
    if given.get("compute_metrics") is not None:
        raise NotImplementedError(f"{OP}: compute_metrics is not supported, because it needs logits")
    peft_configs = [given.get("peft_config"), *getattr(given["model"], "peft_config", {}).values()]
    for config in peft_configs:
        kind = getattr(config, "peft_type", None)
        if getattr(config, "is_prompt_learning", False) and kind not in PROMPTS:
            _refuse("peft_type", str(getattr(kind, "value", kind)), *PROMPTS)
    args = given.get("args")
    if args is None:
        return
    for name, only in ONLY.items():
        if (value := getattr(args, name)) not in only:
            _refuse(name, value, *only)
    check_positive(OP, "beta", args.beta, "a value")
    _check_metric(args, given.get("eval_dataset"))


def _check_metric(args: DPOConfig, eval_dataset: Any) -> None:
    """`metric_for_best_model` must be measured. With several datasets, TRL's own metrics do not name the dataset."""
    if args.metric_for_best_model is None or args.eval_strategy == "no":
        return
    datasets = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, dict) else [""]
    known = [f"{dataset}{metric}" for dataset in datasets for metric in OF_EVALUATION] + list(METRICS)
    name = args.metric_for_best_model.removeprefix("eval_")
    expect(name in known, OP, "metric_for_best_model", "a value in", ", ".join(known), repr(name))


def _refuse(name: str, value: Any, *only: Any) -> None:
    accepted = " or ".join(map(repr, only))
    raise NotImplementedError(f"{OP}: {name}={value!r} is not supported, only {accepted} is")


def _counted(logp: SequenceLogprob) -> tuple[SequenceLogprob, SequenceLogprob]:
    """The log-probs of chosen and rejected answers, where an empty answer counts as a token of log-prob 0."""
    total, mean, count = logp
    chosen, rejected = zip(total.chunk(2), mean.chunk(2), count.clamp_min(1).chunk(2), strict=True)
    return SequenceLogprob(*chosen), SequenceLogprob(*rejected)
