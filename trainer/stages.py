"""The two stages as `transformers.Trainer`s: what each adds is its loss and the figures that it logs.

Checkpoints, resume, schedules, mixed precision, progress and trackers are the library's.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from cwdpo_kernels import (
    ConstrainedSFTOutput,
    Cooling,
    CWDPOOutput,
    GentleNegatives,
    Head,
    SequenceLogprob,
    constrained_sft_loss,
    linear_constrained_sft_loss,
    linear_cwdpo_loss,
    linear_sequence_logprob,
)
from cwdpo_kernels.adapters.hugging_face import attach_head, check_head
from cwdpo_trainer.arguments import DPOArguments, SamplingArguments, SFTArguments, StageArguments
from cwdpo_trainer.card import Origin, changed_settings, write_stage_card
from cwdpo_trainer.causality import check_causal
from cwdpo_trainer.checkpoints import COMPLETE, had_ended, state_of
from cwdpo_trainer.collator import Batch, PairCollator, to_device
from cwdpo_trainer.cooling import measure_cooling
from cwdpo_trainer.curriculum import hardest_first, load_order, measure_rows, save_order
from cwdpo_trainer.data import Row
from cwdpo_trainer.distributed import check_distribution, prepare_reference, saved_parameters_only
from cwdpo_trainer.doctor import Doctor
from cwdpo_trainer.errors import require
from cwdpo_trainer.files import read_json, write_json
from cwdpo_trainer.models import AdapterReference, Model, load_weights
from cwdpo_trainer.negatives_log import NegativesLog
from cwdpo_trainer.onpolicy import Mixed, OnPolicyPool, unmixed
from cwdpo_trainer.policy import PolicyInTraining
from cwdpo_trainer.probes import Probes
from cwdpo_trainer.progress import CompactProgress
from cwdpo_trainer.reference import CachedReference, check_handover, open_cache
from cwdpo_trainer.summary import COOLING_FILE


class StageTrainer(Trainer):
    """What both stages share: pairs as batches, the head call, averaged figures, probes, whole checkpoints.

    `reference` is the frozen model that the stage starts from (`models.freeze_reference`); a stage trains `model`
    on `rows`. `receipt` says what was found out about the model's head, `origin` where the model comes from,
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
        self.receipt = attach_head(model)
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
        name = "a name of a probe"
        require(known, "configuration", "metric_for_best_model", name, ", ".join(names), repr(metric))

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
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self._save_more(folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (folder / COMPLETE).touch()

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


class ConstrainedSFTTrainer(StageTrainer):
    """Stage 1: NLL of the chosen answers, and gentle negatives."""

    args: SFTArguments

    def _loss(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        batch = self._pairs(inputs)

        def op(hidden: Tensor, head: Head) -> ConstrainedSFTOutput:
            negatives = self.args.gentle_negatives
            if negatives.mode == "hinge" and self.accelerator.num_processes > 1:
                return self._hinge_over_processes(linear_sequence_logprob(hidden, head, batch.labels), negatives)
            return linear_constrained_sft_loss(hidden, head, batch.labels, negatives=negatives)

        return model(**batch.inputs, head_op=op)

    def _hinge_over_processes(self, logp: SequenceLogprob, negatives: GentleNegatives) -> ConstrainedSFTOutput:
        """The hinge is on the mean over the batch of all processes, so each moves its floor by how far its own mean
        lies from that."""
        chosen, rejected = (SequenceLogprob(*parts) for parts in zip(*(x.chunk(2) for x in logp), strict=True))
        nll = -(rejected.mean if negatives.normalize == "token" else rejected.total).detach().mean()
        away = self.accelerator.reduce(nll, "mean") - nll
        moved = dataclasses.replace(negatives, nll_floor=negatives.nll_floor - away.item())
        return constrained_sft_loss(chosen, rejected, negatives=moved)

    def _figures(self, output: Any) -> dict[str, Tensor]:
        return {name: getattr(output, name) for name in ("chosen_nll", "rejected_nll", "penalty")}


class CWDPOTrainer(StageTrainer):
    """Stage 2: DPO whose push on a rejected answer cools with the answer's likelihood."""

    args: DPOArguments

    def __init__(
        self, model: Model, reference: nn.Module, args: DPOArguments, rows: list[Row],
        collator: PairCollator, probes: Probes, *, sampling: SamplingArguments, **options: Any,
    ) -> None:  # fmt: skip
        cache = open_cache(args, reference, collator)  # while no weight is sharded yet
        super().__init__(model, reference, args, rows, collator, probes, **options)
        self.sampling = sampling
        self.rows_by_id = {row.id: row for row in rows}
        self.pool = OnPolicyPool(args.refresh_steps, args.onpolicy_staleness, args.seed)
        self.negatives_log = NegativesLog(Path(args.output_dir) / f"negatives_{args.process_index}.jsonl")
        self.cooling = args.fixed_cooling
        self.order: list[int] | None = None  # of the rows in every epoch, if not random
        self.cached_reference = None
        if cache is not None:
            self.cached_reference = CachedReference(
                cache, self._reference_logp, self.rows_by_id, collator, self.accelerator
            )

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        step = 0
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            self.pool.load(self._pool_path(folder))
            self.cooling = Cooling(**read_json(folder / COOLING_FILE))
            step = state_of(resume_from_checkpoint).global_step
        elif self.args.is_cooling_measured:
            self.cooling = self._measured_cooling()
        if self.args.curriculum is not None:
            stored, rows = resume_from_checkpoint is not None, self.train_dataset
            self.order = load_order(folder, len(rows)) if stored else hardest_first(self._measure(rows, "curriculum"))
        self.probes.cooling = self.cooling
        self.negatives_log.start(step)
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.cached_reference is not None and self.is_world_process_zero():
            print(self.cached_reference.cache.describe())
        return output

    def _measured_cooling(self) -> Cooling:
        """The cooling with `auto` measured on the stage's first pairs."""
        measured = list(measure_cooling(self._measure(self.train_dataset[: self.args.auto_rows], "cooling")))
        return self.args.cooling_with(*broadcast_object_list(measured))

    def _measure(self, rows: list[Row], title: str) -> Tensor:
        """The mean log-prob of the rows' rejected answers under the reference, in nats per token."""

        def of_batch(some: list[Row]) -> Tensor:
            inputs = self._collate(some)
            _, total = self._reference_totals(inputs, unmixed(inputs["rejected"]))
            return total / total.new_tensor([len(tokens) for tokens in inputs["rejected"]])

        return measure_rows(rows, of_batch, self.accelerator, self.args.per_device_train_batch_size, title)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self.order is None else self.order

    def _loss(self, model: nn.Module, inputs: dict[str, Any]) -> CWDPOOutput:
        mixed = self._mix(model, inputs)
        batch = self._batch(inputs["prompts"], inputs["chosen"], mixed.negatives)
        ref_chosen, ref_rejected = self._reference_totals(inputs, mixed)
        return model(
            **batch.inputs,
            head_op=lambda hidden, head: linear_cwdpo_loss(
                hidden, head, batch.labels, ref_chosen, ref_rejected,
                beta=self.args.beta, cooling=self.cooling, normalize=self.args.normalize,
            ),
        )  # fmt: skip

    def _mix(self, model: nn.Module, inputs: dict[str, Any]) -> Mixed:
        """The negatives of this step: those of the data set, some replaced by answers of the policy."""
        step, rows = self.state.global_step, inputs["rows"]
        fraction = self.args.onpolicy_schedule.at(step, self.state.max_steps)
        policy = PolicyInTraining(
            self.accelerator.unwrap_model(model), self.collator, self.rows_by_id, self.sampling, self.accelerator
        )
        mixed = self.pool.mix(rows, inputs["rejected"], step, fraction, policy)
        texts = self.collator.tokenizer.batch_decode(mixed.negatives, skip_special_tokens=True)
        answers = [text if drawn else None for text, drawn in zip(texts, mixed.is_onpolicy, strict=True)]
        self.negatives_log.write(step, zip((self.rows_by_id[row].where for row in rows), answers, strict=True))
        figures = {"": mixed.is_onpolicy, "_fraction": [fraction], "_staleness": mixed.staleness}
        for name, values in figures.items():
            mean = sum(values) / len(values) if values else math.nan
            self._sums[f"onpolicy{name}"].append(torch.tensor(mean, device=self.args.device))
        return mixed

    def _reference_totals(self, inputs: dict[str, Any], mixed: Mixed) -> tuple[Tensor, Tensor]:
        """Total log-probs [P] of chosen answers and negatives under the reference, in nats."""
        if self.cached_reference is not None:
            return self.cached_reference(inputs, mixed)
        batch = self._batch(inputs["prompts"], inputs["chosen"], mixed.negatives)
        return self._reference_logp(batch).chunk(2)

    def _reference_logp(self, batch: Batch) -> Tensor:
        """Total log-probs of a batch's answers [S] under the reference, in nats."""
        with torch.no_grad():
            return self.reference(
                **batch.inputs,
                head_op=lambda hidden, head: linear_sequence_logprob(hidden, head, batch.labels).total,
            )

    def _pairs_in_mean(self, output: CWDPOOutput, pairs: int) -> Tensor:
        return output.kept.sum()

    def _figures(self, output: CWDPOOutput) -> dict[str, Tensor]:
        # A pair that left the loss has no say in its figures; a mean over no pair is NaN, which `log` leaves out.
        kept = output.kept
        names = ("margin", "accuracy", "chosen_reward", "rejected_reward", "cooling_weight")
        figures = {name: getattr(output, name)[kept] for name in names}
        figures |= {f"{name}_mean_logp": getattr(output, f"{name}_logp").mean for name in ("chosen", "rejected")}
        return figures | {"kept": kept.float()}

    def _check_first_batch(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        super()._check_first_batch(model, inputs)
        if self.state.global_step == 0:
            batch, totals = self._pairs(inputs), self._reference_totals(inputs, unmixed(inputs["rejected"]))
            check_handover(model, batch, torch.cat(totals))
            if self.args.is_cooling_measured:
                self.log({"logp_floor": self.cooling.logp_floor, "tau": self.cooling.temperature})

    def _save_more(self, folder: Path) -> None:
        self.pool.save(self._pool_path(folder))
        if self.args.should_save:
            write_json(folder / COOLING_FILE, dataclasses.asdict(self.cooling))
            if self.order is not None:
                save_order(folder, self.order)

    def _pool_path(self, checkpoint: Path) -> Path:
        return checkpoint / f"onpolicy_pool_{self.args.process_index}.json"
