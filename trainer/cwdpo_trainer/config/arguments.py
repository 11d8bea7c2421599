"""The options of a run: one dataclass per section of the config file, validated on creation.

stage_arguments.py has those of the stages.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import torch

from cwdpo_trainer.config.checks import Checks, is_finite, one_of


@dataclass
class ModelArguments:
    """The model to train.

    - `path`: a local folder or a Hub name of a vision-language model with its processor, or of a text-only causal
      language model with its tokenizer. A relative path starts at the folder of the config file, or at
      `prepare.folder`.
    - `dtype`: dtype of the weights: `auto` (as saved), `float32`, `bfloat16` or `float16`.
    - `attn_implementation`: attention backend as transformers names it, such as `sdpa` or `flash_attention_2`.
      null: transformers chooses.
    - `quantization`: `4bit` or `8bit` loads quantized weights through bitsandbytes (QLoRA). Needs a section `lora`
      and a GPU. null: no quantization.
    - `freeze`: names of modules to freeze, such as `[vision_tower]`. They get no LoRA adapter either.
    - `prefix_sharing`: encode each prompt and its images once for all answers to it. `auto`: if that is exact on the
      first rows and their prompts average at least 64 tokens; `on`: always, an error if the model cannot; `off`: never.
    """

    path: str
    dtype: str = "auto"
    attn_implementation: str | None = None
    quantization: str | None = None
    freeze: list[str] = field(default_factory=list)
    prefix_sharing: str = "auto"

    def __post_init__(self) -> None:
        check = Checks()
        check(bool(self.path.strip()), "path", "a folder or a name on the Hub", self.path)
        dtypes = ("auto", "float32", "bfloat16", "float16")
        check(self.dtype in dtypes, "dtype", one_of(dtypes), self.dtype)
        known = self.quantization in (None, "4bit", "8bit")
        check(known, "quantization", "null, 4bit or 8bit", self.quantization)
        settings = ("auto", "on", "off")
        check(self.prefix_sharing in settings, "prefix_sharing", one_of(settings), self.prefix_sharing)
        check.done()

    @property
    def torch_dtype(self) -> torch.dtype | str:
        return self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)


@dataclass
class LoraArguments:
    """Train LoRA adapters instead of the model's weights. Options have the names of `peft.LoraConfig`.

    - `r`: rank of the adapters, >= 1.
    - `lora_alpha`: the adapter's output is scaled by `lora_alpha / r`.
    - `lora_dropout`: dropout on the adapter's input, in [0, 1).
    - `target_modules`: names of the modules that get an adapter. `all-linear` is every linear layer except the
      output head; list `lm_head` to adapt the head as well.
    - `exclude_modules`: names of modules that get no adapter. null: none are excluded.
    - `modules_to_save`: names of modules to train in full and to save with the adapter. null: none.
    - `use_rslora`: scale by `lora_alpha / sqrt(r)` instead.
    - `adapter`: a local folder or a Hub name of a trained adapter to start from. Its own settings replace all of the
      above. null: start from a new adapter.
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
        check = Checks()
        check(self.r >= 1, "r", "an integer >= 1", self.r)
        check(self.lora_alpha >= 1, "lora_alpha", "an integer >= 1", self.lora_alpha)
        check(0 <= self.lora_dropout < 1, "lora_dropout", "a number in [0, 1)", self.lora_dropout)
        check.done()


@dataclass
class DataArguments:
    """The preference pairs.

    - `train`, `heldout`: a JSONL or JSON file, a folder, or a Hub dataset `hub:owner/name[:split]`
      (data/sources.py). data/rows.py and data/layouts.py describe the columns. Relative paths start at the folder of
      the config file, or at `prepare.folder`.
    - `sft_fraction`: if both stages run, the fraction of training rows that stage 1 takes, in (0, 1). Stage 2 takes
      the others. A single stage takes all rows.
    - `skip_bad_rows`: false: an invalid row stops the run before training. true: invalid rows are skipped and
      counted, and the first ten are printed.
    - `max_length`: limit on the tokens of a row (prompt with images, and the longer answer), >= 2. null: no limit.
    - `over_length`: what happens to a row above `max_length`: `trim` its answers, `shrink` its images or `skip` the
      row (data/lengths.py).
    """

    train: str
    heldout: str
    sft_fraction: float = 0.75
    skip_bad_rows: bool = False
    max_length: int | None = None
    over_length: str = "trim"

    def __post_init__(self) -> None:
        check = Checks()
        for name in ("train", "heldout"):
            value = getattr(self, name)
            check(bool(value.strip()), name, "a file, a folder or hub:owner/name", value)
        limit = self.max_length
        check(limit is None or limit >= 2, "max_length", "null or an integer >= 2", limit)
        policies = ("trim", "shrink", "skip")
        check(self.over_length in policies, "over_length", one_of(policies), self.over_length)
        check(0 < self.sft_fraction < 1, "sft_fraction", "a number in (0, 1)", self.sft_fraction)
        check.done()


@dataclass
class ProbeArguments:
    """What is measured on held-out rows.

    - `rows`: number of rows that each probe measures: the first ones of `data.heldout`.
    - `batch_size`: prompts or answers per batch of a probe.
    - `caption_rows`: number of held-out prompts to caption at the end of the run.
    """

    rows: int = 128
    batch_size: int = 64
    caption_rows: int = 256

    def __post_init__(self) -> None:
        check = Checks()
        for name in ("rows", "batch_size", "caption_rows"):
            check(getattr(self, name) >= 1, name, "an integer >= 1", getattr(self, name))
        check.done()


def _is_server(url: str) -> bool:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        return False
    return usable and url.isprintable() and not set(" @?#") & set(url)


@dataclass
class SamplingArguments:
    """How answers are sampled from the model, as on-policy negatives and for the probes.

    - `samples`: answers per prompt, >= 1.
    - `temperature`: > 0. Values above 1 give more diverse answers.
    - `top_p`: nucleus sampling: the probability mass of the tokens to sample from, in (0, 1].
    - `max_new_tokens`: longest answer in tokens, >= 1. It also limits captions.
    - `server`: URL of an OpenAI-compatible server that samples the negatives instead, such as
      `http://localhost:8000`. null: the policy samples them itself.
    """

    samples: int = 2
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 64
    server: str | None = None

    def __post_init__(self) -> None:
        check = Checks()
        if self.server is not None:
            expected = "null or a URL such as http://host:port"
            if re.search("[@?]", self.server):  # the run folder and the model card record the config
                expected += ", without a user name, a password or a query"
            shown = re.sub(r"[?].*", "?***", re.sub(r"//.*@", "//***@", self.server))
            check(_is_server(self.server), "server", expected, shown)
            self.server = self.server.rstrip("/").removesuffix("/v1")
        check(self.samples >= 1, "samples", "an integer >= 1", self.samples)
        finite = is_finite(self.temperature) and self.temperature > 0
        check(finite, "temperature", "a finite number > 0", self.temperature)
        check(0 < self.top_p <= 1, "top_p", "a number in (0, 1]", self.top_p)
        check(self.max_new_tokens >= 1, "max_new_tokens", "an integer >= 1", self.max_new_tokens)
        check.done()
