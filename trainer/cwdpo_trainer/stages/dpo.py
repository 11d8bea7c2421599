"""Stage 2: Cooling-Weighted DPO, or another preference loss (`dpo.loss`).

For each pair, with D_w and D_l the log-ratios (policy - reference, nats) of the chosen answer and of the negative:

    w_c  = sigmoid((mean log-prob of the negative - logp_floor) / tau)      a constant for the gradient
    loss = mean over kept pairs of -log sigmoid(beta * (D_w - w_c * D_l))

Where each part is computed:

- w_c and the loss: in the op `linear_cwdpo_loss`, which `linear_preference_loss` calls in `CWDPOTrainer._loss_of`.
  `w_c` alone is `cwdpo_kernels.cooling_weight`. Other losses: `cwdpo_kernels.preference`.
- logp_floor and tau: given as numbers, or measured when the stage starts (cooling.py).
- kept pairs: those whose negative has a mean log-prob of at least drop_below (negative filtering), in the same op.
- the reference's log-probs: one forward per batch, or from the cache (reference.py); none for SimPO, CPO and ORPO.
- negatives: the dataset's, a share of them replaced by the policy's own answers (negatives/pool.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput

from cwdpo_kernels import Cooling, PreferenceOutput, linear_preference_loss, linear_sequence_logprob
from cwdpo_trainer.config.arguments import SamplingArguments
from cwdpo_trainer.config.stage_arguments import AUTO, DPOArguments
from cwdpo_trainer.data.collator import Batch, PairCollator, SharedBatch
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.evaluation.probes import Probes
from cwdpo_trainer.files import read_json, write_json
from cwdpo_trainer.models.distributed import is_sharded
from cwdpo_trainer.models.loading import Model
from cwdpo_trainer.models.reference import Reference
from cwdpo_trainer.negatives.log import NegativesLog
from cwdpo_trainer.negatives.policy import PolicyInTraining
from cwdpo_trainer.negatives.pool import BatchNegatives, OnPolicyPool
from cwdpo_trainer.negatives.server import AnswerServer
from cwdpo_trainer.reporter import say
from cwdpo_trainer.run_folder import COOLING_FILE
from cwdpo_trainer.stages.base import StageTrainer
from cwdpo_trainer.stages.checkpoints import state_of
from cwdpo_trainer.stages.cooling import measure_cooling
from cwdpo_trainer.stages.curriculum import hardest_first, load_order, measure_rows, save_order
from cwdpo_trainer.stages.reference import CachedReference, check_handover, open_cache


class CWDPOTrainer(StageTrainer):
    """Stage 2: DPO that weights the push on a negative by how likely the policy still finds it.

    `cooling` holds logp_floor and tau. If they are `auto`, it is None until `train` measures them; so it is for a loss
    without cooling. `order` lists the row indices of every epoch; None is random order.
    """

    args: DPOArguments

    def __init__(
        self, model: Model, reference: Reference, args: DPOArguments, rows: list[Row],
        collator: PairCollator, probes: Probes, *, sampling: SamplingArguments, **options: Any,
    ) -> None:  # fmt: skip
        cache = open_cache(args, reference, collator)  # before any weight is sharded
        super().__init__(model, reference, args, rows, collator, probes, **options)
        self.sampling = sampling
        self.server = None if sampling.server is None else AnswerServer.open(sampling.server, rows)
        self.rows_by_id = {row.id: row for row in rows}
        self.pool = OnPolicyPool(args.refresh_steps, args.onpolicy_staleness, args.seed)
        self.negatives_log = NegativesLog(args.folder / f"negatives_{args.process_index}.jsonl")
        self.cooling: Cooling | None = args.fixed_cooling
        self.order: list[int] | None = None
        self.cached_reference = None
        if cache is not None:
            self.cached_reference = CachedReference(
                cache, self._reference_logp, self.rows_by_id, self.collator, self.accelerator
            )

    # Narrower than the library's method, as in `StageTrainer`.
    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:  # type: ignore[override]
        if resume_from_checkpoint is None:
            self._start()
        else:
            self._restore(resume_from_checkpoint)
        self.probes.cooling = self.cooling
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.cached_reference is not None:
            say(self.cached_reference.cache.describe())
        return output

    def _start(self) -> None:
        """Measure what depends on the reference."""
        if self.args.is_cooling_measured:
            self.cooling = self._measure_cooling()
        if self.args.curriculum is not None:
            self.order = hardest_first(self._rejected_mean_logp(self.rows, "curriculum"))
        self.negatives_log.start(0)

    def _restore(self, checkpoint: str) -> None:
        """Restore what `_save_stage_files` saved, so that the stage continues exactly."""
        folder = Path(checkpoint)
        self.pool.load(self._pool_path(folder))
        if self.args.has_cooling:
            self.cooling = Cooling(**read_json(folder / COOLING_FILE))
        if self.args.curriculum is not None:
            self.order = load_order(folder, len(self.rows))
        self.negatives_log.start(state_of(checkpoint).global_step)

    def _save_stage_files(self, folder: Path) -> None:
        self.pool.save(self._pool_path(folder))
        self.negatives_log.flush()
        if self.args.should_save:
            if self.cooling is not None:
                write_json(folder / COOLING_FILE, dataclasses.asdict(self.cooling))
            if self.order is not None:
                save_order(folder, self.order)

    def _pool_path(self, checkpoint: Path) -> Path:
        return checkpoint / f"onpolicy_pool_{self.args.process_index}.json"

    def _measure_cooling(self) -> Cooling:
        """The cooling with `auto` values measured on the first `auto_rows` pairs."""
        mean_logp = self._rejected_mean_logp(self.rows[: self.args.auto_rows], "cooling")
        measured = measure_cooling(mean_logp, needs_tau=self.args.is_tau_measured)
        return self.args.cooling_with(*broadcast_object_list(list(measured)))

    def _rejected_mean_logp(self, rows: list[Row], title: str) -> Tensor:
        """The mean log-prob [R] of each row's rejected answer under the reference, in nats per token."""

        def of_batch(batch: list[Row]) -> Tensor:
            inputs = self._collate(batch)
            _, sum_logp = self._reference_sums(inputs, BatchNegatives.of_dataset(inputs["rejected"]))
            return sum_logp / sum_logp.new_tensor([len(tokens) for tokens in inputs["rejected"]])

        return measure_rows(rows, of_batch, self.accelerator, self.args.per_device_train_batch_size, title)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self.order is None else self.order

    def _loss_output(self, model: nn.Module, inputs: dict[str, Any]) -> PreferenceOutput:
        negatives = self._choose_negatives(model, inputs)
        with self._images_once():
            return self._loss_of(model, inputs, negatives)

    def _images_once(self) -> contextlib.AbstractContextManager[None]:
        """Within it, policy and reference share frozen image features.

        Not if a cache may answer for a sharded reference: processes must agree on which modules they run.
        """
        is_uneven = self.cached_reference is not None and is_sharded(self.accelerator)
        return contextlib.nullcontext() if self.image_features is None or is_uneven else self.image_features.once()

    def _loss_of(self, model: nn.Module, inputs: dict[str, Any], negatives: BatchNegatives) -> PreferenceOutput:
        batch = self.collator.join(inputs["prompts"], inputs["chosen"], negatives.answers)
        references = self._reference_sums(inputs, negatives) if self.args.needs_reference else ()
        # Of cwdpo, the op computes w_c from the policy's log-probs in the same pass as the loss.
        loss = self.args.preference_loss(self.cooling)
        return batch.run(
            model,
            lambda hidden, head: linear_preference_loss(
                hidden, head, batch.labels, *references, cu_seqlens=batch.cu_seqlens, loss=loss,
                normalize=self.args.normalize,
            ),
        )  # fmt: skip

    def _choose_negatives(self, model: nn.Module, inputs: dict[str, Any]) -> BatchNegatives:
        """The negatives of this step: the dataset's, some replaced by answers of the policy. Logs their origin."""
        step, rows = self.state.global_step, inputs["rows"]
        fraction = self.args.onpolicy_schedule.at(step, self.state.max_steps)
        if fraction > 0:
            self._check_weights()  # a diverged model cannot be sampled from
        policy = PolicyInTraining(
            self.accelerator.unwrap_model(model), self.collator, self.rows_by_id, self.sampling, self.accelerator,
            self.server,
        )  # fmt: skip
        negatives = self.pool.mix(rows, inputs["rejected"], step, fraction, policy)
        where = [self.rows_by_id[row].where for row in rows]
        texts = self.collator.tokenizer.batch_decode(negatives.answers, skip_special_tokens=True)
        self.negatives_log.write(step, where, negatives.is_onpolicy, texts)
        metrics = {"onpolicy_fraction": fraction, **negatives.metrics()}
        self._record({name: torch.tensor(value, device=self.args.device) for name, value in metrics.items()})
        return negatives

    def _reference_sums(self, inputs: dict[str, Any], negatives: BatchNegatives) -> tuple[Tensor, Tensor]:
        """Summed log-probs [P] of the chosen answers and of the negatives under the reference, in nats."""
        if self.cached_reference is not None:
            return self.cached_reference(inputs, negatives)
        batch = self.collator.join(inputs["prompts"], inputs["chosen"], negatives.answers)
        chosen, rejected = self._reference_logp(batch).chunk(2)
        return chosen, rejected

    def _reference_logp(self, batch: Batch | SharedBatch) -> Tensor:
        """The summed log-prob [S] of each answer of a batch under the reference, in nats."""
        with torch.no_grad():
            return batch.run(
                self.reference,
                lambda hidden, head: linear_sequence_logprob(hidden, head, batch.labels, batch.cu_seqlens).total,
            )

    def _pairs_in_mean(self, output: PreferenceOutput, pairs: int) -> Tensor:
        return output.kept.sum()

    def _metrics(self, output: PreferenceOutput) -> dict[str, Tensor]:
        # Dropped pairs do not count. If all are dropped, the means are NaN, which `log` leaves out.
        kept = output.kept
        names = ["margin", "accuracy", "chosen_reward", "rejected_reward"]
        names += ["cooling_weight"] if self.args.has_cooling else []
        metrics = {name: getattr(output, name)[kept] for name in names}
        metrics |= {f"{name}_mean_logp": getattr(output, f"{name}_logp").mean for name in ("chosen", "rejected")}
        return metrics | {"kept": kept.float()}

    def _check_first_batch(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        super()._check_first_batch(model, inputs)
        if self.state.global_step == 0 and self.args.needs_reference:
            ref_sums = self._reference_sums(inputs, BatchNegatives.of_dataset(inputs["rejected"]))
            check_handover(model, self._dataset_batch(inputs), torch.cat(ref_sums))
            chosen: dict[str, float] = {}
            if self.cooling is not None and self.args.is_cooling_measured:
                chosen |= {"logp_floor": self.cooling.logp_floor, "tau": self.cooling.temperature}
            if self.cooling is not None and self.args.drop_below == AUTO and self.cooling.drop_below is not None:
                chosen["drop_below"] = self.cooling.drop_below
            if chosen:
                self.log(chosen)
