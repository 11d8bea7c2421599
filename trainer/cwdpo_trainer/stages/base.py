"""What the two stages share, as a `transformers.Trainer`: each adds its loss and the figures that it logs.

Checkpoints, resume, schedules, mixed precision, progress and trackers are the library's. The stages: sft.py, dpo.py.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from cwdpo_kernels.integrations.hugging_face import attach_head, check_head
from cwdpo_trainer.config.arguments import StageArguments
from cwdpo_trainer.data.collator import Batch, PairCollator, to_device
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.errors import require
from cwdpo_trainer.evaluation.card import Origin, changed_settings, write_stage_card
from cwdpo_trainer.evaluation.doctor import Doctor
from cwdpo_trainer.evaluation.probes import Probes
from cwdpo_trainer.models.causality import check_causal
from cwdpo_trainer.models.distributed import check_distribution, prepare_reference, saved_parameters_only
from cwdpo_trainer.models.loading import AdapterReference, Model, check_quantization, load_weights
from cwdpo_trainer.stages.checkpoints import COMPLETE, had_ended, state_of
from cwdpo_trainer.stages.progress import CompactProgress


class StageTrainer(Trainer):
    """What both stages share: pairs as batches, the head call, averaged figures, probes, whole checkpoints.

    `reference` is the frozen model that the stage starts from (`models.freeze_reference`); a stage trains `model`
    on `rows`. `head_info` says what was found out about the model's head, `origin` where the model comes from,
    for its card.
    """

    def __init__(
        self,
        model: Model,
        reference: nn.Module,
        args: StageArguments,
        rows: list[Row],
        collator: PairCollator,
        probes: Probes,
        origin: Origin | None = None,
    ) -> None:
        check_quantization(model, args.device)
        self.head_info = attach_head(model)
        if not isinstance(reference, AdapterReference):  # which is `model` with another adapter
            attach_head(reference)
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,  # type: ignore[arg-type]  # a list has all that a map-style dataset needs
            eval_dataset=probes.rows,  # type: ignore[arg-type]
            data_collator=collator,
            processing_class=collator.processor,
        )
        check_distribution(self.accelerator, model)
        self.collator = collator
        self.probes = probes
        self.origin = origin
        self.reference = prepare_reference(self.accelerator, reference.eval().requires_grad_(False).to(args.device))
        self.loss_is_scaled_for_ga = True  # by compute_loss: what it returns adds up over an optimizer step
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        self._is_first_batch = True
        self.remove_callback(PrinterCallback)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(CompactProgress)
        self.add_callback(Doctor)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train, from `resume_from_checkpoint` if given. The last probe is of the final weights."""
        self.probes.draw_onpolicy(self.reference)
        self._check_metric()
        # A resumed run has measured its start already, and early stopping would count it twice.
        self.args.eval_on_start = self.args.eval_on_start and resume_from_checkpoint is None
        if resume_from_checkpoint is not None and had_ended(resume_from_checkpoint):
            output = self._end_again(resume_from_checkpoint)
        else:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        probed = [entry["step"] for entry in self.state.log_history if "eval_chosen_logp" in entry]
        # Only the probe of the last step may be of other weights: those before the best ones were loaded.
        if self.args.load_best_model_at_end or not probed or probed[-1] != self.state.global_step:
            self.evaluate()
        return output

    def _end_again(self, checkpoint: str) -> TrainOutput:
        """The end of a stage that was cut off between its last checkpoint and its saved model. The library's resume
        would train on: it forgets that the stage had stopped, and takes a step before it looks at the limit."""
        self.state = state_of(checkpoint)
        self._load_from_checkpoint(checkpoint)
        if self.args.load_best_model_at_end:
            self._load_best_model()
        return TrainOutput(self.state.global_step, math.nan, {})

    def _check_metric(self) -> None:
        metric = self.args.metric_for_best_model
        names = self.probes.names()
        known = metric is None or metric.removeprefix("eval_") in names
        require(known, "config", "metric_for_best_model", f"a probe metric out of {', '.join(names)}", repr(metric))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if self._is_first_batch:
            self._check_first_batch(model, inputs)
            self._is_first_batch = False
        output = self._loss(model, inputs)
        for name, value in self._figures(output).items():
            self._sums[name].append(value.detach().float().mean())
        loss = output.loss
        if num_items_in_batch is not None:
            # Of all pairs of the optimizer step; the mean over processes is taken with the gradients.
            share = self._pairs_in_mean(output, len(inputs["rows"])) / num_items_in_batch
            loss = loss * share * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """The pairs of an optimizer step, over its micro-batches and processes: what its loss is normalised by."""
        pairs = sum(len(batch["rows"]) for batch in batch_samples)
        return self.accelerator.reduce(torch.tensor(pairs, device=device), "sum")

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The probes, logged as `eval_*` like any evaluation of the library."""
        model = self.model_wrapped if self.is_in_train else self.model
        measured = self.probes.measure(model, self.reference, self.args.device)
        # Those of one process for all: figures decide when to stop, and a GPU's last bits differ.
        (figures,) = broadcast_object_list([measured])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Training logs also get the figures of the loss, averaged since the last of them."""
        if "loss" in logs:
            for name, values in sorted(self._sums.items()):
                stacked = torch.stack(values)
                sums = torch.stack([stacked.nansum(), (~stacked.isnan()).sum()])
                total, count = self.accelerator.reduce(sums, "sum").tolist()
                if count:
                    logs[name] = total / count
            self._sums.clear()
        super().log(logs, start_time)

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """What `push_to_hub` sends along: the card, as far as the stage has come, in place of the library's draft."""
        if self.is_world_process_zero():
            folder, args = Path(self.args.output_dir), self.args
            origin = self.origin or Origin(self.model.config.name_or_path, {args.stage: changed_settings(args)}, {})
            name, history = model_name or folder.name, self.state.log_history
            write_stage_card(folder, args.stage, name, history, vars(args), origin, str(args.device))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        args, limit = self.args, self.args.save_total_limit
        args.save_total_limit = None  # no older checkpoint is deleted before this one is whole
        try:
            super()._save_checkpoint(model, trial)
        finally:
            args.save_total_limit = limit
        folder = Path(args.output_dir) / f"checkpoint-{self.state.global_step}"
        self._save_more(folder)
        self.accelerator.wait_for_everyone()
        if args.should_save:
            (folder / COMPLETE).touch()
            rotate_checkpoints(args.output_dir, limit, self.state.best_model_checkpoint, use_mtime=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with saved_parameters_only(self.accelerator, self.model, checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _pairs(self, inputs: dict[str, Any]) -> Batch:
        """The data set's pairs of a batch of the collator."""
        return self._batch(inputs["prompts"], inputs["chosen"], inputs["rejected"])

    def _batch(self, prompts: dict[str, Tensor], *answers: list[list[int]]) -> Batch:
        return self.collator.join(prompts, *answers)

    def _check_first_batch(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """The head is what the model computes with, and no answer sees its own future. One pair is enough, and its
        full logits fit."""
        batch = self._pairs(self._collate([self.train_dataset[0]]))
        check_head(model, *batch)
        check_causal(model, *batch)

    def _collate(self, rows: list[Row]) -> dict[str, Any]:
        inputs = self.collator(rows)
        return {**inputs, "prompts": to_device(inputs["prompts"], self.args.device)}

    def _save_more(self, folder: Path) -> None:
        """What a stage adds to its checkpoints."""

    def _loss(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def _pairs_in_mean(self, output: Any, pairs: int) -> int | Tensor:
        """How many of a batch's `pairs` the loss in `output` is a mean over."""
        return pairs

    def _figures(self, output: Any) -> dict[str, Tensor]:
        raise NotImplementedError
