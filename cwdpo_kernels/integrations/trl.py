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
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from .. import IGNORE_INDEX, Cooling, CWDPOOutput, Head, linear_cwdpo_loss, linear_sequence_logprob, shift_labels
from .hugging_face import attach_head

# Options of DPOConfig that CoolingDPOTrainer does not implement, and the only value of each that it accepts.
ONLY = {
    "loss_type": ["sigmoid"], "loss_weights": None, "ld_alpha": None, "label_smoothing": 0.0, "use_weighting": False,
    "f_divergence_type": "reverse_kl", "padding_free": False, "use_liger_kernel": False, "parallelism_config": None,
}  # fmt: skip


class CoolingDPOTrainer(DPOTrainer):
    """TRL's DPOTrainer with the loss -log sigmoid(beta * (D_w - w_c * D_l)), D = policy - reference log-prob.

    cooling: defines w_c; `Cooling(constant=1.0)` is DPO as TRL computes it.
    normalize: "sequence" for D of total log-probs, "token" for D of means.

    Everything else works as TRL documents it: models by name or loaded, datasets with and without images, and the
    reference (adapter off, precomputed, `ref_model`, or the policy reloaded by name). A policy that has been trained
    since it was loaded needs `ref_model`.

    The head is called inside the model's forward (`attach_head`), so wrappers' hooks fire. It logs TRL's `rewards/*`,
    `logps/*` (sums, nats) and `num_tokens`, and also `cooling_weight` (mean over the kept pairs), `kept` (their share),
    `mean_logps/chosen` and `mean_logps/rejected` (nats per token). It does not log TRL's `entropy`, `logits/*` and
    `mean_token_accuracy`, which would cost another pass over the vocabulary.

    NotImplementedError: options that differ from `ONLY`, router losses of mixtures of experts, `compute_metrics` and
    `predict` (they need logits). HeadError: the head is not supported (see `attach_head`).
    """

    model: PreTrainedModel  # or a peft model, which forwards attributes to it; never None after __init__

    def __init__(
        self, model: Any, ref_model: Any = None, args: DPOConfig | None = None, *more: Any,
        cooling: Cooling, normalize: str = "sequence", **options: Any,
    ) -> None:  # fmt: skip
        for name, only in ONLY.items() if args is not None else ():
            if (value := getattr(args, name)) != only:
                raise NotImplementedError(f"CoolingDPOTrainer: {name}={value!r} is not supported, only {only!r} is")
        self.cooling, self.normalize = cooling, normalize
        super().__init__(model, ref_model, args, *more, **options)
        if self.aux_loss_enabled:
            coefficient = self.router_aux_loss_coef
            raise NotImplementedError(
                f"CoolingDPOTrainer: router_aux_loss_coef={coefficient} is not supported, only 0.0 is"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        # Attach here: the model is loaded (by TRL or the caller), but not wrapped by TRL or accelerate yet.
        if name in ("model", "ref_model") and (isinstance(value, PreTrainedModel) or hasattr(value, "get_base_model")):
            attach_head(value)
        super().__setattr__(name, value)

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Total log-probs of the chosen [P] and the rejected [P] answers under the reference, in nats."""
        labels = _labels(inputs)
        adapter: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            policy = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(policy, "ref" if "ref" in policy.peft_config else None)
        options = self.args.gradient_checkpointing_kwargs
        options = None if isinstance(options, str) else options  # never a string: DPOConfig has parsed it
        checkpointing = disable_gradient_checkpointing(self.model, options)
        with torch.no_grad(), checkpointing, adapter, self.accelerator.autocast():
            logp = model(
                **_model_inputs(inputs),
                head_op=lambda hidden, head: linear_sequence_logprob(hidden, head, labels).total,
            )
        chosen, rejected = logp.chunk(2)
        return chosen, rejected

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Tensor:
        if return_outputs:
            raise NotImplementedError("CoolingDPOTrainer: compute_metrics and predict need logits: not supported")
        if self.precompute_ref_logps:
            chosen, rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            chosen, rejected = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        labels, beta, cooling, normalize = _labels(inputs), self.beta, self.cooling, self.normalize

        def head_op(hidden: Tensor, head: Head) -> CWDPOOutput:
            return linear_cwdpo_loss(
                hidden, head, labels, chosen, rejected, beta=beta, cooling=cooling, normalize=normalize
            )

        output = model(**_model_inputs(inputs), head_op=head_op)
        self._record(output, inputs["attention_mask"])
        return output.loss

    def _record(self, output: CWDPOOutput, attention_mask: Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        metrics = {
            "rewards/chosen": output.chosen_reward, "rewards/rejected": output.rejected_reward,
            "rewards/accuracies": output.accuracy, "rewards/margins": output.margin,
            "logps/chosen": output.chosen_logp.total, "logps/rejected": output.rejected_logp.total,
            "mean_logps/chosen": output.chosen_logp.mean, "mean_logps/rejected": output.rejected_logp.mean,
            "kept": output.kept, "cooling_weight": output.cooling_weight * output.kept,
        }  # fmt: skip
        table = self.accelerator.gather(torch.stack([metric.float() for metric in metrics.values()], dim=1))
        means = dict(zip(metrics, table.mean(0).tolist(), strict=True))
        weight = means.pop("cooling_weight")
        if means["kept"]:  # without a kept pair there is no mean weight
            means["cooling_weight"] = weight / means["kept"]
        for name, mean in means.items():
            self._metrics[mode][name].append(mean)
        if mode == "train":
            self._total_train_tokens += self.accelerator.gather(attention_mask.sum()).sum().item()
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


def _labels(inputs: dict[str, Any]) -> Tensor:
    return shift_labels(inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX))


def _model_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The model's inputs: all keys but TRL's own, because processors may add any."""
    own = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
    return {name: value for name, value in inputs.items() if name not in own}
