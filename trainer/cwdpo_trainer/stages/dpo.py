"""Stage 2: Cooling-Weighted DPO."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from cwdpo_kernels import (
    Cooling,
    CWDPOOutput,
    linear_cwdpo_loss,
    linear_sequence_logprob,
)
from cwdpo_trainer.config.arguments import DPOArguments, SamplingArguments
from cwdpo_trainer.data.collator import Batch, PairCollator
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.evaluation.probes import Probes
from cwdpo_trainer.files import read_json, write_json
from cwdpo_trainer.models.loading import Model
from cwdpo_trainer.negatives.log import NegativesLog
from cwdpo_trainer.negatives.policy import PolicyInTraining
from cwdpo_trainer.negatives.pool import Mixed, OnPolicyPool, unmixed
from cwdpo_trainer.negatives.server import AnswerServer
from cwdpo_trainer.run_folder import COOLING_FILE
from cwdpo_trainer.stages.base import StageTrainer
from cwdpo_trainer.stages.checkpoints import state_of
from cwdpo_trainer.stages.cooling import measure_cooling
from cwdpo_trainer.stages.curriculum import hardest_first, load_order, measure_rows, save_order
from cwdpo_trainer.stages.reference import CachedReference, check_handover, open_cache


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
        self.server = None if sampling.server is None else AnswerServer.open(sampling.server, rows)
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
            self.accelerator.unwrap_model(model), self.collator, self.rows_by_id, self.sampling, self.accelerator,
            self.server,
        )  # fmt: skip
        mixed = self.pool.mix(rows, inputs["rejected"], step, fraction, policy)
        places = [self.rows_by_id[row].where for row in rows]
        texts = self.collator.tokenizer.batch_decode(mixed.negatives, skip_special_tokens=True)
        self.negatives_log.write(step, places, mixed.is_onpolicy, texts)
        for name, value in {"onpolicy_fraction": fraction, **mixed.figures()}.items():
            self._sums[name].append(torch.tensor(value, device=self.args.device))
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
