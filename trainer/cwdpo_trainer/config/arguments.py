"""The settings of a run: one dataclass per section of the YAML file, checked when it is made.

The two stages extend `transformers.TrainingArguments`, so each of its options is an option here too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from cwdpo_kernels import Cooling, GentleNegatives
from cwdpo_trainer.config.findings import finding_names
from cwdpo_trainer.config.schedule import Schedule
from cwdpo_trainer.errors import InputError, require

CONFIG = "config"  # where an error is, until the loader names the file
AUTO = "auto"
MODES = ("adaptive", "constant", "off")
LESS_IS_BETTER = ("_ece", "_tv", "_js")  # ends of metrics' names
# Options of `TrainingArguments` that would be without effect, or (the first) keep a killed run from going on.
_UNUSED = {"save_only_model": False, "resume_from_checkpoint": None, "label_smoothing_factor": 0.0}


def _check(condition: bool, key: str, expected: str, got: object) -> None:
    """Raise `InputError` about `key` of a section unless `condition` holds; the loader adds file and section."""
    require(condition, CONFIG, key, expected, "null" if got is None else repr(got))


def _one_of(names: Iterable[str]) -> str:
    return "one of " + ", ".join(names)


@dataclass
class ModelArguments:
    """`path`: folder or Hub name of a vision-language model and its processor; `dtype` of its weights.

    `attn_implementation` as transformers names them ("flash_attention_2", "sdpa", ...; None: its choice).
    `quantization` "4bit" or "8bit" loads quantised weights through bitsandbytes, to train LoRA on (QLoRA).
    `freeze`: names of modules that are not trained, e.g. [vision_tower].
    """

    path: str
    dtype: str = "auto"
    attn_implementation: str | None = None
    quantization: str | None = None
    freeze: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        dtypes = ("auto", "float32", "bfloat16", "float16")
        _check(self.dtype in dtypes, "dtype", _one_of(dtypes), self.dtype)
        known = self.quantization in (None, "4bit", "8bit")
        _check(known, "quantization", "null, 4bit or 8bit", self.quantization)

    @property
    def torch_dtype(self) -> torch.dtype | str:
        return self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)


@dataclass
class LoraArguments:
    """Train LoRA adapters in place of the model's own weights; the names are those of `peft.LoraConfig`.

    `target_modules` "all-linear" is every linear layer but the head; a list names modules, lm_head among them if it
    should have an adapter too; `modules_to_save` are trained as a whole. `adapter`: folder or Hub name of an
    adapter to start from, in place of a new one; then the other settings are its own.
    """

    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    use_rslora: bool = False
    adapter: str | None = None

    def __post_init__(self) -> None:
        _check(self.r >= 1, "r", "an integer >= 1", self.r)
        _check(0 <= self.lora_dropout < 1, "lora_dropout", "a number in [0, 1)", self.lora_dropout)


@dataclass
class DataArguments:
    """`train`, `heldout`: preference pairs, in files or data sets (names: sources.py; columns: data.py, layouts.py).
    Where both stages run, stage 1 takes a share `sft_fraction` of the training rows (seeded shuffle) and stage 2
    the others; one stage alone takes all. A bad row stops the run before it starts; with `skip_bad_rows` such
    rows are left out, and their number and the first ten are printed. A row of more than `max_length` tokens
    (prompt, images and the longer answer) is treated as `over_length` says, see lengths.py; None: rows have no
    limit."""

    train: str
    heldout: str
    sft_fraction: float = 0.75
    skip_bad_rows: bool = False
    max_length: int | None = None
    over_length: str = "trim"

    def __post_init__(self) -> None:
        limit = self.max_length
        _check(limit is None or limit >= 2, "max_length", "null or an integer >= 2", limit)
        policies = ("trim", "shrink", "skip")
        _check(self.over_length in policies, "over_length", _one_of(policies), self.over_length)
        _check(0 < self.sft_fraction < 1, "sft_fraction", "a number in (0, 1)", self.sft_fraction)


@dataclass
class ProbeArguments:
    """What is measured on held-out rows: `rows` at each probe; `caption_rows` are captioned at the end."""

    rows: int = 128
    batch_size: int = 64
    caption_rows: int = 256

    def __post_init__(self) -> None:
        for name in ("rows", "batch_size", "caption_rows"):
            _check(getattr(self, name) >= 1, name, "an integer >= 1", getattr(self, name))


@dataclass
class SamplingArguments:
    """How the model's own answers are drawn, for on-policy negatives and for their probe.

    `server`: address of a server of chat completions that draws the negatives instead (server.py)."""

    samples: int = 2
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 64
    server: str | None = None

    def __post_init__(self) -> None:
        if self.server is not None:
            is_url = self.server.startswith(("http://", "https://"))
            _check(is_url, "server", "null or a URL such as http://host:port", self.server)
            self.server = self.server.rstrip("/").removesuffix("/v1")
        _check(self.samples >= 1, "samples", "an integer >= 1", self.samples)
        _check(self.temperature > 0, "temperature", "a number > 0", self.temperature)
        _check(0 < self.top_p <= 1, "top_p", "a number in (0, 1]", self.top_p)
        _check(self.max_new_tokens >= 1, "max_new_tokens", "an integer >= 1", self.max_new_tokens)


@dataclass
class StageArguments(TrainingArguments):
    """Options of both stages. `eval_*` of `TrainingArguments` are about the probes here.

    `early_stopping_patience`: stop after so many probes without a better `metric_for_best_model`
    (any probe, e.g. `chosen_mean_logp`); None never stops. `greater_is_better` null: true but for calibration errors
    and differences from the reference (ece, tv, js). `stop_on`: stop when a probe shows one of these findings of the
    doctor (doctor.py); one that the start shows stops after the first step.
    """

    eval_strategy: str = "steps"
    eval_on_start: bool = True
    logging_steps: float = 10
    save_total_limit: int | None = 2
    restore_callback_states_from_checkpoint: bool = True  # early stopping goes on counting
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = field(default_factory=torch.accelerator.is_available)
    early_stopping_patience: int | None = None
    stop_on: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # With a limit of 1 the library deletes the last checkpoint as training ends, if it is not the best one: a kill
        # before the model is saved would cost all steps since the best.
        limit = self.save_total_limit
        _check(limit is None or limit >= 2, "save_total_limit", "null or an integer >= 2", limit)
        patience = self.early_stopping_patience
        expected = "null or an integer >= 1"
        _check(patience is None or patience >= 1, "early_stopping_patience", expected, patience)
        has_metric = patience is None or self.metric_for_best_model is not None
        expected = "the name of a probe metric, as early_stopping_patience is set"
        _check(has_metric, "metric_for_best_model", expected, None)
        for name, unused in _UNUSED.items():
            value = getattr(self, name)
            expected = f"{'null' if unused is None else unused} (the trainer does not support this option)"
            _check(value == unused, name, expected, value)
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith(LESS_IS_BETTER)
        known = finding_names(self.stage)
        for name in self.stop_on:
            _check(name in known, "stop_on", f"names of findings out of {', '.join(known)}", name)
        if self.use_liger_kernel:
            # Its kernels serve the rest of the model; its patch of the forward is about the head, which is ours.
            fused_heads = {"fused_linear_cross_entropy": False, "cross_entropy": False}
            self.liger_kernel_config = {**(self.liger_kernel_config or {}), **fused_heads}
        super().__post_init__()
        installed = get_available_reporting_integrations()
        for name in self.report_to:
            _check(name in installed, "report_to", f"installed trackers, out of {installed}", name)


@dataclass
class SFTArguments(StageArguments):
    """Stage 1, constrained SFT: the options of `cwdpo_kernels.GentleNegatives`; `negatives` is its mode."""

    stage = "sft"  # no annotation: a fact, not an option

    negatives: str = "hinge"
    negatives_weight: float = GentleNegatives.weight
    nll_floor: float = GentleNegatives.nll_floor
    smoothing: float = GentleNegatives.smoothing
    normalize: str = "token"

    def __post_init__(self) -> None:
        _ = self.gentle_negatives  # its own checks
        super().__post_init__()

    @property
    def gentle_negatives(self) -> GentleNegatives:
        return GentleNegatives(self.negatives_weight, self.nll_floor, self.negatives, self.smoothing, self.normalize)


@dataclass
class DPOArguments(StageArguments):
    """Stage 2, CW-DPO.

    `cooling`: "adaptive" weights a rejected answer by w_c = sigmoid((mean log-prob - logp_floor) / tau),
    "constant" by `constant_weight`, "off" by 1 (vanilla DPO). `logp_floor`, `tau`: numbers, in nats per token, or
    "auto": measured on the first `auto_rows` pairs as the stage starts (cooling.py). In each mode pairs whose
    rejected answer has a mean log-prob below `drop_below` (negative filtering; null: none) leave the loss.

    A share `onpolicy_fraction` of the pairs (a number, or points of a schedule.py) gets a negative that the policy
    drew itself. A drawn answer serves its row for `refresh_steps` optimizer steps, or until the row's answers have
    lost more than `onpolicy_staleness` nats per token under the policy (null: not measured); then it is drawn anew.

    `curriculum` "hardest_first": pairs come in the order of their negative's w_c, measured once (curriculum.py); null:
    in random order.

    `reference_cache`: folder of the reference's log-probs of the data set's pairs (reference_cache.py); one that is
    not absolute lies in the run folder; null computes them at every step.
    """

    stage = "dpo"

    beta: float = 0.1
    cooling: str | bool = "adaptive"  # YAML reads `off` as false
    logp_floor: float | str = Cooling.logp_floor
    tau: float | str = Cooling.temperature
    auto_rows: int = 256
    constant_weight: float | None = None
    drop_below: float | None = None
    normalize: str = "sequence"
    onpolicy_fraction: Any = 0.0
    onpolicy_staleness: float | None = 0.1
    refresh_steps: int = 50
    curriculum: str | None = None
    reference_cache: str | None = "reference_cache"

    def __post_init__(self) -> None:
        self.cooling = "off" if self.cooling is False else self.cooling
        _check(self.cooling in MODES, "cooling", _one_of(MODES), self.cooling)
        for name in ("logp_floor", "tau"):
            value = getattr(self, name)
            _check(value == AUTO or not isinstance(value, str), name, "a number or auto", value)
        constant, weight = self.cooling == "constant", self.constant_weight
        expected = "a number, as cooling is constant" if constant else "null, as cooling is not constant"
        _check(constant == (weight is not None), "constant_weight", expected, weight)
        _ = self.cooling_with(Cooling.logp_floor, Cooling.temperature)  # its own checks
        _check(self.auto_rows >= 2, "auto_rows", "an integer >= 2", self.auto_rows)
        _check(math.isfinite(self.beta) and self.beta > 0, "beta", "a finite number > 0", self.beta)
        _check(self.normalize in ("sequence", "token"), "normalize", "sequence or token", self.normalize)
        known = self.curriculum in (None, "hardest_first")
        _check(known, "curriculum", "null or hardest_first", self.curriculum)
        self._check_onpolicy()
        super().__post_init__()

    def _check_onpolicy(self) -> None:
        try:
            shares = [share for _, share in self.onpolicy_schedule.points]
        except ValueError as error:
            expected = "a number, or [position, value] points with increasing positions"
            raise InputError(CONFIG, "onpolicy_fraction", expected, repr(self.onpolicy_fraction)) from error
        for share in shares:
            _check(0 <= share <= 1, "onpolicy_fraction", "numbers in [0, 1]", share)
        limit = self.onpolicy_staleness
        _check(limit is None or limit >= 0, "onpolicy_staleness", "null or a number >= 0", limit)
        _check(self.refresh_steps >= 1, "refresh_steps", "an integer >= 1", self.refresh_steps)

    @property
    def onpolicy_schedule(self) -> Schedule:
        return Schedule.of(self.onpolicy_fraction)

    @property
    def is_cooling_measured(self) -> bool:
        """Whether the cooling depends on the model that the stage starts from."""
        return self.cooling == "adaptive" and AUTO in (self.logp_floor, self.tau)

    @property
    def fixed_cooling(self) -> Cooling | None:
        """The cooling, or None where it has to be measured."""
        return None if self.is_cooling_measured else self.cooling_with(Cooling.logp_floor, Cooling.temperature)

    def cooling_with(self, measured_floor: float, measured_tau: float) -> Cooling:
        """The cooling, with these in place of auto."""
        floor = measured_floor if self.logp_floor == AUTO else self.logp_floor
        tau = measured_tau if self.tau == AUTO else self.tau
        weight = 1.0 if self.cooling == "off" else self.constant_weight
        return Cooling(floor, tau, weight, self.drop_below)
