"""The base class of both stages: a `transformers.Trainer` for preference pairs.

The library provides checkpoints, resume, schedules, mixed precision, progress bars and trackers. `StageTrainer` adds
the call of the model's head, probes, the doctor and complete checkpoints. A stage adds its loss: sft.py, dpo.py.

How to add a loss to a stage: change the stage's `_loss_output`. In its `head_op`, `linear_sequence_logprob(hidden,
head, labels)` gives the log-probs of all answers. Any differentiable function of them can be the loss.

How to add a stage:

1. Here: subclass `StageTrainer`, implement `_loss_output` and `_metrics`. sft.py is the shorter example.
2. config/stage_arguments.py: subclass `StageArguments` with the stage's options, and set `stage` to its name.
3. config/: add the name to `SECTIONS`, `STAGES` and `OPTIONAL` (sections.py), a field to `RunConfig` and to its
   `_arguments` (loader.py), and the name to the findings that apply to it in `STAGES_OF_FINDING` (findings.py).
4. Add it to `MODEL_FOLDERS` and `LABEL_OF_STAGE` (run_folder.py), `TITLES`, `METHODS` and `STAGE_TITLES` (summary.py,
   card.py and plot.py in evaluation/), `HIGHEST_RATE` (preflight/run_rules.py) and `TRAINING` (cli.py).
5. run.py: construct the trainer in `_trainer`, and say in `_starts_after_sft` which model the stage starts from.
6. These name stage "dpo" for what only it has; see whether the new stage has it too: measure.py, report.py, card.py and
   doctor.py in evaluation/, and `Run.check` in run.py.
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
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from cwdpo_kernels.integrations.hugging_face import attach_head, check_head
from cwdpo_kernels.integrations.shared_images import ImageFeatures
from cwdpo_trainer.config.stage_arguments import StageArguments
from cwdpo_trainer.data.collator import Batch, PairCollator, SharedBatch, to_device
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.errors import require
from cwdpo_trainer.evaluation.card import Origin, changed_settings, write_stage_card
from cwdpo_trainer.evaluation.doctor import Doctor
from cwdpo_trainer.evaluation.probes import Probes
from cwdpo_trainer.files import writing
from cwdpo_trainer.manifest import is_sealed, seal, verify
from cwdpo_trainer.models.distributed import check_distribution, prepare_reference, saved_parameters_only
from cwdpo_trainer.models.forward_checks import check_causal, choose_sharing
from cwdpo_trainer.models.loading import Model, check_quantization, load_weights, move
from cwdpo_trainer.models.reference import AdapterReference, Reference
from cwdpo_trainer.reporter import say
from cwdpo_trainer.rounding import FEW, REMEDIES, count_moved, is_low_precision
from cwdpo_trainer.stages.checkpoints import checkpoint_path, delete, had_stopped, keep_newest, state_of
from cwdpo_trainer.stages.finite import check_finite, check_finite_weights
from cwdpo_trainer.stages.grouping import GroupedByLength
from cwdpo_trainer.stages.progress import CompactProgress, TrainingClock


class StageTrainer(Trainer):
    """Trains `model` on `rows`, probes it on held-out rows and writes complete checkpoints.

    `reference` is a frozen copy of `model` as the stage starts (`freeze_reference`). `origin` says where the model
    comes from, for the model card. The attribute `head_info` describes the model's output head, and `sharing` says
    whether prompts are encoded once for all their answers.

    Subclasses implement `_loss_output` and `_metrics`, and may override `_pairs_in_mean` and `_save_stage_files`.
    """

    args: StageArguments
    model: Model
    model_wrapped: nn.Module

    def __init__(
        self,
        model: Model,
        reference: Reference,
        args: StageArguments,
        rows: list[Row],
        collator: PairCollator,
        probes: Probes,
        origin: Origin | None = None,
        prefix_sharing: str = "auto",
    ) -> None:
        check_quantization(model, args.device)
        self.head_info = attach_head(model)
        if not isinstance(reference, AdapterReference):  # an AdapterReference shares the head of `model`
            attach_head(reference)
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,  # a list is a map-style dataset
            eval_dataset=probes.rows,
            data_collator=collator,
            processing_class=collator.processing_class,
        )
        check_distribution(self.accelerator, model)
        self.rows = rows
        self.collator = collator
        self.probes = probes
        self.origin = origin
        reference.eval().requires_grad_(False)
        move(reference, args.device)
        self.reference: Any = prepare_reference(self.accelerator, reference)
        models = [model] if isinstance(reference, AdapterReference) else [model, reference]
        self.sharing = choose_sharing(
            prefix_sharing, models, self.reference, collator, rows, args.device, args.torch_compile
        )
        self.image_features: ImageFeatures | None = None
        if self.sharing.is_shared:
            self.collator = self.probes.collator = collator.on_trees(model)
            self.image_features = self.probes.image_features = ImageFeatures(*models)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the pairs of the whole optimizer step
        self._recorded: dict[str, list[Tensor]] = defaultdict(list)  # metrics of the batches since the last log
        self._is_first_batch = True
        self.remove_callback(PrinterCallback)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(CompactProgress)
        self.add_callback(Doctor(probes.answer_counts))
        self.add_callback(TrainingClock)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    def create_accelerator_and_postprocess(self) -> None:
        """The library's accelerator. The library writes num_steps into the user's options, and refuses them if it finds
        it there: other trainers may share the options."""
        super().create_accelerator_and_postprocess()
        config: Any = self.args.accelerator_config
        (config.gradient_accumulation_kwargs or {}).pop("num_steps", None)

    # Narrower than the library's method: a path or None, never True.
    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:  # type: ignore[override]
        """Train, from `resume_from_checkpoint` if given. The last probe measures the final weights."""
        self.probes.draw_onpolicy(self.reference)
        self._check_metric_name()
        # A resumed run has probed its start already. A second probe would count twice for early stopping.
        self.args.eval_on_start = self.args.eval_on_start and resume_from_checkpoint is None
        if resume_from_checkpoint is not None and had_stopped(resume_from_checkpoint):
            output = self._finish_stopped_stage(resume_from_checkpoint)
        else:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        probed = [entry["step"] for entry in self.state.log_history if "eval_chosen_logp" in entry]
        # Loading the best weights changes the model after the last probe.
        if self.args.load_best_model_at_end or not probed or probed[-1] != self.state.global_step:
            self.evaluate()
        self._log_moved_weights()
        return output

    def _log_moved_weights(self) -> None:
        """Log the share of the weights that moved, if rounding may have kept them. Adapters are float32."""
        if isinstance(self.reference, AdapterReference) or not is_low_precision(self.model):
            return
        counts = torch.tensor(count_moved(self.model, self.reference), device=self.args.device)
        moved, total = self.accelerator.reduce(counts, "sum").tolist()
        advice = f"; {REMEDIES}" if moved < FEW * total else ""
        say(f"{self.args.stage}: {moved / total:.2%} of the trained weights moved{advice}")
        self.log({"weights_moved": moved / total, "trained_weights": total})

    @property
    def _clock(self) -> TrainingClock:
        """The stage's clock. Resuming replaces the callback."""
        return next(each for each in self.callback_handler.callbacks if isinstance(each, TrainingClock))

    def _finish_stopped_stage(self, checkpoint: str) -> TrainOutput:
        """Resume a stage that was killed after its last checkpoint but before its model was saved. No steps are left.

        The library's resume would train on, because it does not restore `should_training_stop` and takes one step
        before it checks `max_steps`.
        """
        self.state = state_of(checkpoint)
        self._restore_best_checkpoint(checkpoint)
        self._load_from_checkpoint(checkpoint)
        if self.args.load_best_model_at_end:
            self._load_best_model()
        self._clock.before = TrainingClock.saved_seconds(self.state)
        self.log({"train_runtime": 0.0})
        return TrainOutput(self.state.global_step, math.nan, {})

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        pairs = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return GroupedByLength(self.rows, self.collator, pairs, self.args.seed)

    def _check_metric_name(self) -> None:
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
        output = self._loss_output(model, inputs)
        self._record({name: value.detach().float().mean() for name, value in self._metrics(output).items()})
        loss = output.loss
        if num_items_in_batch is not None:
            # The mean over all pairs of the optimizer step. DDP and FSDP average the gradients over processes.
            share = self._pairs_in_mean(output, len(inputs["rows"])) / num_items_in_batch
            loss = loss * share * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """The number of pairs in an optimizer step, over micro-batches and processes. The loss is divided by it."""
        pairs = sum(len(batch["rows"]) for batch in batch_samples)
        return self.accelerator.reduce(torch.tensor(pairs, device=device), "sum")

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Probe the model. The metrics are logged as `eval_*`, as in any evaluation of the library."""
        self._check_weights()
        model = self.model_wrapped if self.is_in_train else self.model
        measured = self.probes.measure(model, self.reference, self.args.device, f"probe {self.state.global_step}")
        # All processes use rank 0's metrics. They may differ in the last bits, and all must stop at the same step.
        (probed,) = broadcast_object_list([measured])
        check_finite(self._where(self.state.global_step), "log-probs of the chosen answers", probed["chosen_logp"])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in probed.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a training log the mean of each recorded metric over all batches since the previous one.

        The runtime of the last log includes that of earlier processes, if the stage was resumed.
        """
        if "train_runtime" in logs:
            logs["train_runtime"] = round(self._clock.seconds, 4)
        if "loss" in logs:
            for name, values in sorted(self._recorded.items()):
                stacked = torch.stack(values)
                sum_and_count = torch.stack([stacked.nansum(), (~stacked.isnan()).sum()])
                value_sum, count = self.accelerator.reduce(sum_and_count, "sum").tolist()
                if count:
                    logs[name] = value_sum / count
            self._recorded.clear()
        super().log(logs, start_time)

    def _record(self, metrics: dict[str, Tensor]) -> None:
        """Keep scalar metrics of a batch for the next training log. NaN means "no value" and is left out."""
        for name, value in metrics.items():
            self._recorded[name].append(value)

    # Narrower than the library's method, whose first parameter is another: callers use keywords.
    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the model card that `push_to_hub` uploads, from the stage's log so far, instead of the library's."""
        if self.is_world_process_zero():
            folder, args = self.args.folder, self.args
            name_or_path, text_only = str(self.model.config.name_or_path), self.collator.is_text_only
            origin = self.origin or Origin(name_or_path, {args.stage: changed_settings(args)}, {}, text_only)
            name, history, answers = model_name or folder.name, self.state.log_history, self.probes.answer_counts()
            write_stage_card(folder, args.stage, name, history, vars(args), answers, origin, str(args.device))

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The library's step, for a loss that is a finite number. It raises `InputError` before the weights change."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        check_finite(self._where(self.state.global_step + 1), "loss", loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The library's norm of the gradients. It raises `InputError` before a step with infinite or NaN gradients."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and self.accelerator.scaler is None:  # a scaler skips such steps and lowers its scale
            check_finite(self._where(self.state.global_step + 1), "norm of the gradients", norm)
        return norm

    def _check_weights(self) -> None:
        check_finite_weights(self._where(self.state.global_step), self.model, self.accelerator)

    def _where(self, step: int) -> str:
        return f"stage {self.args.stage}, step {step}, learning_rate {self.args.learning_rate:g}"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint, declare it complete, and only then delete older ones beyond `save_total_limit`."""
        self._check_weights()
        args, limit = self.args, self.args.save_total_limit
        folder = checkpoint_path(args.folder, self.state.global_step)
        with writing(folder, "a checkpoint"):
            if args.should_save and folder.exists():
                delete(folder)  # left by a process that was killed, or damaged
            self.accelerator.wait_for_everyone()
            args.save_total_limit = None  # the library would delete older checkpoints here, and order them by time
            try:
                super()._save_checkpoint(model, trial)
            finally:
                args.save_total_limit = limit
            self._save_stage_files(folder)
            self.accelerator.wait_for_everyone()
            if args.should_save:
                seal(folder)
                keep_newest(args.folder, self.state.global_step, self._best_checkpoint(self.state), limit)

    def _best_checkpoint(self, state: TrainerState) -> Path | None:
        """The best checkpoint that `state` names, in the stage's folder: the run folder may have moved since."""
        recorded = state.best_model_checkpoint
        path = None if recorded is None else self.args.folder / Path(recorded).name
        return path if path is not None and is_sealed(path) else None

    def _restore_best_checkpoint(self, resumed: str) -> None:
        best = self._best_checkpoint(state_of(resumed))
        self.state.best_model_checkpoint = None if best is None else str(best)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int,
        resume_from_checkpoint: str | None, trial: Any,
    ) -> Any:  # fmt: skip
        """The library's state. Of a folder that has moved, it would forget which checkpoint is the best."""
        done = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None:
            self._restore_best_checkpoint(resume_from_checkpoint)
        return done

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with saved_parameters_only(self.accelerator, self.model, checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        best = self._best_checkpoint(self.state)
        if best is not None:
            verify(best)
            self._load_from_checkpoint(str(best))

    def _check_first_batch(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Check that the fused log-probs are the model's own, and that no answer token sees later ones.

        One pair is enough, and its full logits fit into memory.
        """
        pair = self._collate([self.rows[0]])
        batch = self.collator.join_padded(pair["prompts"], pair["chosen"], pair["rejected"])
        check_head(model, batch.inputs, batch.labels)
        check_causal(model, batch.inputs, batch.labels)

    def _collate(self, rows: list[Row]) -> dict[str, Any]:
        """A batch of `PairCollator`, on the device."""
        inputs = self.collator(rows)
        return {**inputs, "prompts": to_device(inputs["prompts"], self.args.device)}

    def _dataset_batch(self, inputs: dict[str, Any]) -> Batch | SharedBatch:
        """Model inputs and labels for the dataset's pairs: P chosen answers, then P rejected ones."""
        return self.collator.join(inputs["prompts"], inputs["chosen"], inputs["rejected"])

    def _loss_output(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """The stage's loss on a batch of `PairCollator`: an output with `.loss`, the mean over the batch's pairs."""
        raise NotImplementedError

    def _metrics(self, output: Any) -> dict[str, Tensor]:
        """What to log of `_loss_output`'s result: tensors by name. Their means are logged."""
        raise NotImplementedError

    def _pairs_in_mean(self, output: Any, pairs: int) -> int | Tensor:
        """How many of the batch's `pairs` the loss in `output` averages over."""
        return pairs

    def _save_stage_files(self, folder: Path) -> None:
        """Add the stage's own files to a checkpoint. Every process calls this."""
