"""The options of the stages: the sections `sft` and `dpo` of the config file, validated on creation.

Both extend `transformers.TrainingArguments`, so a stage section accepts its options too, apart from those that
`StageArguments` names.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from cwdpo_kernels import PREFERENCE_LOSSES, Cooling, CoolingWeighted, GentleNegatives, PreferenceLoss
from cwdpo_trainer.config.checks import Checks, as_number, check_loss_options, is_finite, one_of
from cwdpo_trainer.config.findings import finding_names
from cwdpo_trainer.config.training_rules import check_training, try_training
from cwdpo_trainer.errors import did_you_mean

AUTO = "auto"
DROP_TAUS = math.log(19)  # sigmoid(-ln 19) = 0.05: the cooling weight of `drop_below: auto`
COOLING_MODES = ("adaptive", "constant", "off")
OF_COOLING = ("cooling", "logp_floor", "tau", "auto_rows", "constant_weight", "drop_below")  # options of loss cwdpo
LOWER_IS_BETTER = ("_ece", "_tv", "_js")  # suffixes of metric names


@dataclass
class StageArguments(TrainingArguments):
    """Options of both stages, in addition to those of `transformers.TrainingArguments`.

    The `eval_*` options control the probes. These defaults differ from the library's: `eval_strategy` steps,
    `eval_on_start` true, `logging_steps` 10, `save_total_limit` 2 (null or >= 2),
    `restore_callback_states_from_checkpoint` true, `dataloader_pin_memory` true only if there is an accelerator,
    `logging_nan_inf_filter` false: a stage stops at a loss that is not finite.

    An option that a stage would ignore, or that would spoil the training, is refused unless it has its default. The
    error says what to use instead. Refused:

    - top-level keys set them: `output_dir`, `seed`
    - the trainer sets them: `data_seed`, `remove_unused_columns`, `do_train`, `do_eval`, `do_predict`
    - the probes do not use them (set `batch_size` of section `probes`): `per_device_eval_batch_size`,
      `prediction_loss_only`, `eval_do_concat_batches`, `eval_use_gather_object`, `eval_accumulation_steps`,
      `include_for_metrics`, `batch_eval_metrics`, `bf16_full_eval`, `fp16_full_eval`
    - training on pairs does not use them: `label_names`, `length_column_name`, `include_num_input_tokens_seen`,
      `average_tokens_across_devices`, `label_smoothing_factor`, `use_cache`
    - a stage stops at numbers that are not finite: `logging_nan_inf_filter`, `debug`
    - a stage must resume as if it had not been killed: `auto_find_batch_size`, `dataloader_in_order`,
      `save_only_model`, `resume_from_checkpoint`, `enable_jit_checkpoint`, `save_on_each_node`
    - not supported (set `fsdp`, and start with `accelerate launch`): `deepspeed`, `parallelism_config`, `local_rank`

    So are options of something that is off, such as `hub_model_id` without `push_to_hub`, and of `accelerator_config`
    all keys but `non_blocking` and `sync_each_batch`.

    The others:

    - `activation_checkpointing`, `activation_checkpointing_kwargs`: compute activations again in the backward, to save
      memory. transformers before 5.23 names them `gradient_checkpointing*`; here they have the new names with every
      version.
    - `early_stopping_patience`: stop after this many probes in a row without a better `metric_for_best_model`. Any
      probe metric can decide, such as `chosen_mean_logp`. null: never stop early.
    - `greater_is_better`: null: true, except for calibration errors and distances to the reference (metrics that end
      in `_ece`, `_tv` or `_js`).
    - `stop_on`: names of the doctor's findings (config/findings.py) that stop the stage when a probe shows one. A
      finding that holds from the start stops the stage after its first step.
    """

    stage: ClassVar[str]  # name of the section

    eval_strategy: str = "steps"
    eval_on_start: bool = True
    logging_steps: float = 10
    save_total_limit: int | None = 2
    restore_callback_states_from_checkpoint: bool = True  # a resumed run keeps its early-stopping count
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = field(default_factory=torch.accelerator.is_available)
    activation_checkpointing: bool | None = None
    activation_checkpointing_kwargs: dict[str, Any] | str | None = None
    early_stopping_patience: int | None = None
    stop_on: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check = Checks()
        self._check_options(check)
        check.done()
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith(LOWER_IS_BETTER)
        if self.use_liger_kernel:
            # Liger's kernels serve the rest of the model. Its fused heads would replace ours.
            fused_heads = {"fused_linear_cross_entropy": False, "cross_entropy": False}
            self.liger_kernel_config = {**(self.liger_kernel_config or {}), **fused_heads}
        if not hasattr(TrainingArguments, "activation_checkpointing"):
            self._use_old_names()
        super().__post_init__()
        try_training(self)

    def _use_old_names(self) -> None:
        """Set what transformers before 5.23 reads."""
        if self.activation_checkpointing is not None:
            self.gradient_checkpointing = self.activation_checkpointing
        if self.activation_checkpointing_kwargs is not None:
            self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs

    def _check_options(self, check: Checks) -> None:
        check_training(self, check)
        patience = self.early_stopping_patience
        check(patience is None or patience >= 1, "early_stopping_patience", "null or an integer >= 1", patience)
        known = finding_names(self.stage)
        for name in self.stop_on:
            check(name in known, "stop_on", f"names of findings out of {', '.join(known)}", name)
        installed = get_available_reporting_integrations()
        trackers = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        for name in trackers:
            check(name in (*installed, "all", "none"), "report_to", f"installed trackers, out of {installed}", name)

    def __getstate__(self) -> dict[str, Any]:
        """Without the access token: the library pickles its options into every checkpoint and saved model."""
        return {**self.__dict__, "hub_token": None}

    @property
    def folder(self) -> Path:
        """The folder of the stage's checkpoints."""
        return Path(self.output_dir or "")


@dataclass
class SFTArguments(StageArguments):
    """Stage 1, constrained SFT: NLL of the chosen answers plus a gentle penalty on likely rejected answers.

    See `cwdpo_kernels.GentleNegatives`, whose defaults apply.

    - `negatives`: what happens to rejected answers: `hinge` pushes their mean NLL above `nll_floor` by a penalty;
      `hard` trains on nothing else until it is above; `smoothed` is label-smoothed cross-entropy on them.
    - `negatives_weight`: weight of the penalty, >= 0. 0 is plain supervised fine-tuning. `hard` has no weight.
    - `nll_floor`: the mean NLL of a batch's rejected answers at which `hinge` and `hard` stop pushing, C of the paper.
      Its unit is that of `normalize`: nats per token, or nats per answer as the paper prints it.
    - `smoothing`: label smoothing of `smoothed`, in [0, 1).
    - `normalize`: `token` averages an answer's NLL over its tokens (nats per token), `sequence` sums it (nats per
      answer).
    """

    stage: ClassVar[str] = "sft"

    negatives: str = "hinge"
    negatives_weight: float = GentleNegatives.weight
    nll_floor: float = GentleNegatives.nll_floor
    smoothing: float = GentleNegatives.smoothing
    normalize: str = "token"

    def _check_options(self, check: Checks) -> None:
        super()._check_options(check)
        check(self.negatives in GentleNegatives.MODES, "negatives", one_of(GentleNegatives.MODES), self.negatives)
        weight = self.negatives_weight
        check(math.isfinite(weight) and weight >= 0, "negatives_weight", "a finite number >= 0", weight)
        check(math.isfinite(self.nll_floor), "nll_floor", "a finite number", self.nll_floor)
        for name in ("negatives_weight", "nll_floor"):
            check.float32(name, getattr(self, name))
        check(0 <= self.smoothing < 1, "smoothing", "a number in [0, 1)", self.smoothing)
        check(self.normalize in ("token", "sequence"), "normalize", "token or sequence", self.normalize)

    @property
    def gentle_negatives(self) -> GentleNegatives:
        return GentleNegatives(self.negatives_weight, self.nll_floor, self.negatives, self.smoothing, self.normalize)


@dataclass(frozen=True)
class Schedule:
    """A number that changes over a stage, given by (position, value) points: linear between them, constant outside.

    Positions are fractions of the stage if none is above 1, else optimizer steps.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, value: Any) -> Schedule:
        """From a number, or a list of [position, value] with increasing positions. Raises `ValueError` otherwise."""
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            value = [(0.0, value)]
        try:
            points = tuple((float(position), float(number)) for position, number in value)
        except (TypeError, OverflowError) as error:
            raise ValueError("neither a number nor a list of [position, value]") from error
        positions = [position for position, _ in points]
        increasing = all(before < after for before, after in pairwise(positions))
        if not points or not positions[0] >= 0 or not increasing:
            raise ValueError("positions must be >= 0 and increasing")
        return cls(points)

    def at(self, step: int, steps: int) -> float:
        """The value at optimizer step `step` of `steps`."""
        position = step / max(steps, 1) if self.points[-1][0] <= 1 else float(step)
        for (left, before), (right, after) in pairwise(self.points):
            if left <= position < right:
                return before + (after - before) * (position - left) / (right - left)
        return self.points[0][1] if position < self.points[0][0] else self.points[-1][1]


@dataclass
class DPOArguments(StageArguments):
    """Stage 2: CW-DPO, or another preference loss. Log-probs are in nats.

    - `loss`: `cwdpo`, or a loss of [`cwdpo_kernels.preference`](api/kernels.md#preference-losses): `sigmoid` (DPO),
      `hinge`, `ipo`, `robust`, `exo_pair`, `nca_pair`, `bco_pair`, `sppo_hard`, `apo_zero`, `apo_down`, `discopop`; or
      `simpo`, `cpo` and `orpo`, which have no reference: no step runs it (the probes do).
    - `loss_options`: options of `loss` other than `beta`, such as `{gamma: 1.0}` for `simpo`.
    - `beta`: the beta of DPO: scale of the log-ratios to the reference, > 0. For `simpo` take 2 to 2.5.
    - `cooling`: weight w_c of a rejected answer: `adaptive` is sigmoid((mean log-prob - `logp_floor`) / `tau`),
      `constant` is `constant_weight`, `off` is 1 (with `drop_below: null` that is vanilla DPO).
    - `logp_floor`, `tau`: a number in nats per token (`tau` > 0), or `auto`: measured on `auto_rows` pairs when the
      stage starts (stages/cooling.py).
    - `auto_rows`: number of pairs that `auto` measures, the first ones, >= 2.
    - `constant_weight`: the weight of `cooling: constant`, in [0, 1]. null for the other modes.
    - `drop_below`: leave out pairs whose rejected answer is extremely easy: the policy gives it a mean log-prob below
      this, in nats per token (negative filtering, in every cooling mode). `auto`: `logp_floor` - 2.94 `tau`, where the
      adaptive w_c is 0.05. null: leave out none.
    - `normalize`: `sequence` compares sums of log-probs (DPO), `token` means. null: as the loss is defined, `token` for
      `ipo`, `simpo` and `orpo`, else `sequence`.
    - `onpolicy_fraction`: fraction of the pairs whose negative is sampled from the policy: a number in [0, 1], or
      [position, fraction] points with linear interpolation. Positions are fractions of the stage, or optimizer steps
      if any is above 1.
    - `refresh_steps`: optimizer steps after which a row's sampled answers are replaced, >= 1.
    - `onpolicy_staleness`: replace a row's sampled answers earlier, once the policy finds them less likely by more
      than this many nats per token, >= 0. null: do not measure it.
    - `curriculum`: `hardest_first` orders the pairs by falling w_c under the reference (stages/curriculum.py).
      null: random order.
    - `reference_cache`: folder for the reference's log-probs of the dataset's pairs (models/reference_cache.py).
      Runs can share it. A relative path is inside the run folder. null: compute them at every step.

    `cooling`, `logp_floor`, `tau`, `auto_rows`, `constant_weight` and `drop_below` belong to loss `cwdpo`. With another
    loss they are refused, except `drop_below: null`. So is a `reference_cache` with a loss without a reference.
    """

    stage: ClassVar[str] = "dpo"

    loss: str = CoolingWeighted.name
    loss_options: dict[str, Any] = field(default_factory=dict)
    beta: float = 0.1
    cooling: str | bool = "adaptive"  # YAML reads `off` as false
    logp_floor: float | str = Cooling.logp_floor
    tau: float | str = Cooling.temperature
    auto_rows: int = 256
    constant_weight: float | None = None
    drop_below: float | str | None = AUTO
    normalize: str | None = None
    onpolicy_fraction: Any = 0.0
    onpolicy_staleness: float | None = 0.1
    refresh_steps: int = 50
    curriculum: str | None = None
    reference_cache: str | None = "reference_cache"

    def __post_init__(self) -> None:
        self.cooling = "off" if self.cooling is False else self.cooling
        super().__post_init__()

    def _check_options(self, check: Checks) -> None:
        super()._check_options(check)
        check(self.cooling in COOLING_MODES, "cooling", one_of(COOLING_MODES), self.cooling)
        self._check_cooling(check)
        check(self.auto_rows >= 2, "auto_rows", "an integer >= 2", self.auto_rows)
        check(math.isfinite(self.beta) and self.beta > 0, "beta", "a finite number > 0", self.beta)
        for name in ("beta", "logp_floor", "tau", "drop_below"):
            check.float32(name, getattr(self, name))
        check(self.normalize in (None, "sequence", "token"), "normalize", "sequence or token", self.normalize)
        self._check_loss(check)
        known = self.curriculum in (None, "hardest_first")
        check(known, "curriculum", "null or hardest_first", self.curriculum)
        random = self.curriculum is None or self.train_sampling_strategy == "random"
        expected = "random, as curriculum sets the order"
        check(random, "train_sampling_strategy", expected, self.train_sampling_strategy)
        self._check_onpolicy(check)

    def _check_loss(self, check: Checks) -> None:
        names = list(PREFERENCE_LOSSES)
        check(self.loss in names, "loss", one_of(names) + did_you_mean(self.loss, names), self.loss)
        if check.found("loss"):
            return
        check_loss_options(check, self._loss_type, self.loss_options)
        defaults = {each.name: each.default for each in fields(self) if each.default is not MISSING}
        for name in () if self.has_cooling else OF_COOLING:
            value, default = getattr(self, name), defaults[name]
            is_off = name == "drop_below" and value is None
            expected = (
                f"its default {'null' if default is None else default}, as loss {self.loss} has no cooling weight"
            )
            check(is_off or value == default, name, expected, value)
        if not self.needs_reference:
            expected = f"its default or null, as loss {self.loss} has no reference"
            check(self.reference_cache in (None, "reference_cache"), "reference_cache", expected, self.reference_cache)

    def _check_cooling(self, check: Checks) -> None:
        floor, tau, weight = self.logp_floor, self.tau, self.constant_weight
        check(floor == AUTO or is_finite(floor), "logp_floor", "a finite number or auto", floor)
        check(tau == AUTO or (is_finite(tau) and tau > 0), "tau", "a finite number > 0 or auto", tau)
        if self.cooling == "constant":
            ok = weight is not None and 0 <= weight <= 1
            check(ok, "constant_weight", "a number in [0, 1], as cooling is constant", weight)
        elif self.cooling in COOLING_MODES:
            check(weight is None, "constant_weight", "null, as cooling is not constant", weight)
        low = self.drop_below
        check(low is None or low == AUTO or is_finite(low), "drop_below", "null, a finite number or auto", low)
        if low == AUTO and is_finite(floor) and is_finite(tau):
            ok = math.isfinite(floor - DROP_TAUS * tau)
            check(ok, "tau", "a number for which logp_floor - 2.94 tau is finite, as drop_below is auto", tau)

    def _check_onpolicy(self, check: Checks) -> None:
        try:
            fractions = [fraction for _, fraction in self.onpolicy_schedule.points]
        except ValueError:
            fractions = []
            expected = "a number, or [position, fraction] points with increasing positions"
            check(False, "onpolicy_fraction", expected, self.onpolicy_fraction)
        for fraction in fractions:
            check(0 <= fraction <= 1, "onpolicy_fraction", "numbers in [0, 1]", fraction)
        limit = self.onpolicy_staleness
        check(limit is None or limit >= 0, "onpolicy_staleness", "null or a number >= 0", limit)
        check(self.refresh_steps >= 1, "refresh_steps", "an integer >= 1", self.refresh_steps)

    @property
    def onpolicy_schedule(self) -> Schedule:
        return Schedule.of(self.onpolicy_fraction)

    @property
    def _loss_type(self) -> type[PreferenceLoss]:
        return PREFERENCE_LOSSES[self.loss]

    @property
    def has_cooling(self) -> bool:
        """Whether the loss weights and filters its negatives."""
        return self._loss_type is CoolingWeighted

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the reference."""
        return self._loss_type.needs_reference

    @property
    def normalization(self) -> str:
        """`normalize`, or that of the loss."""
        return self.normalize or self._loss_type.normalize

    def preference_loss(self, cooling: Cooling | None) -> PreferenceLoss:
        """The loss with its options. `cooling`: of loss cwdpo, measured or fixed."""
        options = {key: as_number(value) for key, value in self.loss_options.items()}
        if self.has_cooling:
            options["cooling"] = cooling
        return self._loss_type(beta=self.beta, **options)

    def describe_loss(self) -> str:
        """The loss and its options on one line."""
        given = {"beta": self.beta, **self.loss_options}
        options = vars(self._loss_type(**{key: as_number(value) for key, value in given.items()}))
        shown = [f"{key} {value:g}" for key, value in options.items() if key != "cooling"]
        shown += [f"cooling {self.cooling}"] if self.has_cooling else []
        shown += ["means of log-probs" if self.normalization == "token" else "sums of log-probs"]
        shown += [] if self.needs_reference else ["no reference"]
        return f"loss of stage dpo: {self.loss} ({', '.join(shown)})"

    @property
    def is_cooling_measured(self) -> bool:
        """Whether `logp_floor` or `tau` is needed and measured when the stage starts."""
        needed = self.has_cooling and (self.cooling == "adaptive" or self.drop_below == AUTO)
        return needed and AUTO in (self.logp_floor, self.tau)

    @property
    def is_tau_measured(self) -> bool:
        return self.is_cooling_measured and self.tau == AUTO

    @property
    def fixed_cooling(self) -> Cooling | None:
        """The cooling that the config determines. None if it has to be measured, or the loss has none."""
        is_fixed = self.has_cooling and not self.is_cooling_measured
        return None if not is_fixed else self.cooling_with(Cooling.logp_floor, Cooling.temperature)

    def cooling_with(self, measured_floor: float, measured_tau: float) -> Cooling:
        """The cooling with measured values instead of `auto`."""
        floor = measured_floor if isinstance(self.logp_floor, str) else self.logp_floor  # the only string is `auto`
        tau = measured_tau if isinstance(self.tau, str) else self.tau
        weight = 1.0 if self.cooling == "off" else self.constant_weight
        drop_below = floor - DROP_TAUS * tau if isinstance(self.drop_below, str) else self.drop_below
        return Cooling(floor, tau, weight, drop_below)
