"""The settings of a run: one dataclass per section of the YAML file, checked when it is made.

The two stages extend `transformers.TrainingArguments`, so each of its options is an option here too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from cwdpo_kernels import Cooling, GentleNegatives
from cwdpo_trainer.doctor import names_of_rules


def _check(condition: bool, arg: str, prop: str, expected: str, actual: object) -> None:
    if not condition:
        raise ValueError(f"expected {arg} to have {prop} {expected}, got {actual!r}")


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
        known = ("auto", "float32", "bfloat16", "float16")
        _check(self.dtype in known, "dtype", "value", "in " + ", ".join(known), self.dtype)
        known = (None, "4bit", "8bit")
        _check(self.quantization in known, "quantization", "value", "null, 4bit or 8bit", self.quantization)

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
        _check(self.r >= 1, "r", "value", ">= 1", self.r)
        _check(0 <= self.lora_dropout < 1, "lora_dropout", "value", "in [0, 1)", self.lora_dropout)


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
        _check(self.max_length is None or self.max_length >= 2, "max_length", "value", "null or >= 2", self.max_length)
        policies = ("trim", "shrink", "skip")
        _check(self.over_length in policies, "over_length", "value", "in " + ", ".join(policies), self.over_length)
        _check(0 < self.sft_fraction < 1, "sft_fraction", "value", "in (0, 1)", self.sft_fraction)


@dataclass
class ProbeArguments:
    """What is measured on held-out rows: `rows` at each probe; `caption_rows` are captioned at the end."""

    rows: int = 128
    batch_size: int = 64
    caption_rows: int = 256

    def __post_init__(self) -> None:
        for name in ("rows", "batch_size", "caption_rows"):
            _check(getattr(self, name) >= 1, name, "value", ">= 1", getattr(self, name))


@dataclass
class SamplingArguments:
    """How the model's own answers are drawn, for on-policy negatives and for their probe."""

    samples: int = 2
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        _check(self.samples >= 1, "samples", "value", ">= 1", self.samples)
        _check(self.temperature > 0, "temperature", "value", "> 0", self.temperature)
        _check(0 < self.top_p <= 1, "top_p", "value", "in (0, 1]", self.top_p)
        _check(self.max_new_tokens >= 1, "max_new_tokens", "value", ">= 1", self.max_new_tokens)


@dataclass
class StageArguments(TrainingArguments):
    """Options of both stages. `eval_*` of `TrainingArguments` are about the probes here.

    `early_stopping_patience`: stop after so many probes without a better `metric_for_best_model`
    (any probe, e.g. `chosen_mean_logp`); None never stops. `stop_on`: stop when a probe shows one of these
    findings of the doctor (doctor.py).
    """

    eval_strategy: str = "steps"
    eval_on_start: bool = True
    logging_steps: float = 10
    save_total_limit: int | None = 2
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = field(default_factory=torch.accelerator.is_available)
    early_stopping_patience: int | None = None
    stop_on: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # A kill in the middle of a save must leave the checkpoint before it; a limit of 1 deletes that first.
        limit = self.save_total_limit
        _check(limit is None or limit >= 2, "save_total_limit", "value", "null or >= 2", limit)
        patience = self.early_stopping_patience
        _check(patience is None or patience >= 1, "early_stopping_patience", "value", "null or >= 1", patience)
        needs_metric = patience is not None and self.metric_for_best_model is None
        _check(
            not needs_metric,
            "metric_for_best_model",
            "value",
            "a probe, as early_stopping_patience is set",
            None,
        )
        known = names_of_rules(self.stage)
        for name in self.stop_on:
            _check(name in known, "stop_on", "names of findings in", ", ".join(known), name)
        if self.use_liger_kernel:
            # Its kernels serve the rest of the model; its patch of the forward is about the head, which is ours.
            fused_heads = {"fused_linear_cross_entropy": False, "cross_entropy": False}
            self.liger_kernel_config = {**(self.liger_kernel_config or {}), **fused_heads}
        super().__post_init__()
        installed = get_available_reporting_integrations()
        for name in self.report_to:
            _check(name in installed, "report_to", "trackers that are installed in", str(installed), name)


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
    """Stage 2, CW-DPO. `logp_floor`, `tau`, `constant`, `drop_below` are those of `cwdpo_kernels.Cooling`.

    A share `onpolicy_fraction` of the pairs gets a negative that the policy drew itself; a drawn answer
    serves its row for `refresh_steps` optimizer steps, then it is drawn anew.
    """

    stage = "dpo"

    beta: float = 0.1
    logp_floor: float = Cooling.logp_floor
    tau: float = Cooling.temperature
    constant: float | None = None
    drop_below: float | None = None
    normalize: str = "sequence"
    onpolicy_fraction: float = 0.0
    refresh_steps: int = 50

    def __post_init__(self) -> None:
        _ = self.cooling  # its own checks
        _check(math.isfinite(self.beta) and self.beta > 0, "beta", "value", "finite and > 0", self.beta)
        _check(self.normalize in ("sequence", "token"), "normalize", "value", "sequence or token", self.normalize)
        share = self.onpolicy_fraction
        _check(0 <= share <= 1, "onpolicy_fraction", "value", "in [0, 1]", share)
        _check(self.refresh_steps >= 1, "refresh_steps", "value", ">= 1", self.refresh_steps)
        super().__post_init__()

    @property
    def cooling(self) -> Cooling:
        return Cooling(self.logp_floor, self.tau, self.constant, self.drop_below)
