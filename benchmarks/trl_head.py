"""Ten steps of TRL's trainers with TRL's own head and with ours, in float32 and in bfloat16 (CPU).

All runs of a case start from the same weights and get the same batches. In float32 both heads must give the same
losses: a difference above `TOLERANCE` stops the report. In bfloat16 (autocast, as TRL's configs default to), each is
compared with TRL's own run in float32, by losses and by weights.

The model is a Llama that has learned a small language first, so that most tokens are likely, as after supervised
fine-tuning. GRPO and RLOO get completions from the data set instead of sampling them: samples would differ after the
first rounding, and the runs could not be compared. For the same reason no case has `top_entropy_quantile`: the first
tokens of a prompt's completions have equal entropies, and rounding decides which of them are above the quantile.
"""

from __future__ import annotations

import contextlib
import functools
import io
import random
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import datasets
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cwdpo_kernels.integrations.trl import use_fused_head

STEPS, PAIRS, GROUP = 10, 4, 4  # steps; pairs of a batch; completions of a prompt
TOLERANCE = 1e-5  # largest difference of losses in float32, relative to max(1, loss)
WORDS, PROMPT, ANSWER = 400, 6, 12
TRL, OURS = "TRL's head", "our head"
DTYPES = {"float32": False, "bfloat16": True}


class FixedCompletions:
    """A trainer whose completions come from the data set, a different one for each repetition of a prompt."""

    def _generate_single_turn(self: Any, prompt_ids: list[list[int]], *args: Any, **options: Any) -> Any:
        found = [_completion(ids, index % GROUP) for index, ids in enumerate(prompt_ids)]
        return (found, None) if isinstance(self, trl.GRPOTrainer) else found


class FixedGRPO(FixedCompletions, trl.GRPOTrainer):
    pass


class FixedRLOO(FixedCompletions, trl.RLOOTrainer):
    pass


@dataclass(frozen=True)
class Case:
    """A trainer, its config, the columns of its rows, and options of the config."""

    trainer: Callable[..., Any]
    config: Callable[..., Any]
    columns: Callable[[int], list[dict]]
    options: dict[str, Any] = field(default_factory=dict)


class Run(NamedTuple):
    losses: Tensor  # [STEPS], float64
    update: Tensor  # the change of all weights, float64


def measurements() -> dict[str, Callable[..., dict]]:
    """Name -> measurement (see run.SUITES)."""
    return {name: functools.partial(measure, case) for name, case in CASES.items()}


def measure(case: Case, repeats: int, call: Callable, steps: int = STEPS) -> dict:
    """Errors of both heads. Raises SystemExit if their losses differ in float32."""
    del repeats, call  # nothing is timed
    runs = {
        (head, dtype): train(case, head == OURS, bf16, steps) for head in (TRL, OURS) for dtype, bf16 in DTYPES.items()
    }
    truth = runs[TRL, "float32"]
    differences = {head: runs[head, "bfloat16"].losses - truth.losses for head in (TRL, OURS)}
    float32 = runs[OURS, "float32"].losses - truth.losses
    worst = (float32.abs() / truth.losses.abs().clamp(min=1)).max().item()
    if not worst <= TOLERANCE:
        raise SystemExit(f"trl_head: losses in float32 differ by {worst:.1e}, nothing is reported: {runs}")
    return {
        "steps": steps,
        "losses": truth.losses.tolist(),
        "float32": {"loss": worst, "update": _relative(runs[OURS, "float32"].update, truth.update)},
        "bfloat16": {
            head: {"loss": gap.abs().mean().item(), "update": _relative(runs[head, "bfloat16"].update, truth.update)}
            for head, gap in differences.items()
        },
    }


def _relative(found: Tensor, truth: Tensor) -> float:
    return ((found - truth).norm() / truth.norm()).item()


def train(case: Case, ours: bool, bf16: bool, steps: int) -> Run:
    """Losses and change of the weights of one run."""
    datasets.disable_progress_bars()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore")  # TRL 1.16 uses names that transformers has renamed
        if ours:
            stack.enter_context(use_fused_head())
        model = LlamaForCausalLM(_config())
        model.load_state_dict(learned())
        model.save_pretrained(f"{folder}/model")  # TRL loads policy and reference by this name
        args = case.config(
            f"{folder}/run", max_steps=steps, per_device_train_batch_size=PAIRS, logging_steps=1, learning_rate=1e-3,
            gradient_checkpointing=False, bf16=bf16, use_cpu=True, save_strategy="no", report_to="none",
            disable_tqdm=True, lr_scheduler_type="constant", **case.options,
        )  # fmt: skip
        more = {"reward_funcs": _reward} if case.trainer in (FixedGRPO, FixedRLOO) else {}
        torch.manual_seed(0)
        trainer = case.trainer(
            f"{folder}/model", args=args, train_dataset=Dataset.from_list(case.columns(steps)),
            processing_class=tokenizer(), **more,
        )  # fmt: skip
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    start, end = learned(), trainer.model.state_dict()
    update = torch.cat([(end[name].double() - start[name].double()).flatten() for name in start])
    return Run(torch.tensor(losses, dtype=torch.float64), update)


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=WORDS + 3, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    names = ["<pad>", "<s>", "</s>", *(f"w{index}" for index in range(WORDS))]
    backend = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _words(generator: random.Random, first: int, count: int, errors: float) -> list[int]:
    """Words that follow `first`: each is a function of the one before, or random with probability `errors`."""
    words = []
    for _ in range(count):
        first = generator.randrange(WORDS) if generator.random() < errors else (7 * first + 3) % WORDS
        words.append(first)
    return words


def _text(words: list[int]) -> str:
    return "".join(f" w{word}" for word in words)


@functools.cache
def learned() -> dict[str, Tensor]:
    """Weights of a model that has learned the language."""
    torch.manual_seed(0)
    generator = random.Random(0)
    model = LlamaForCausalLM(_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        rows = [_words(generator, generator.randrange(WORDS), 16, errors=0.1) for _ in range(32)]
        ids = torch.tensor(rows) + 3
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _pairs(steps: int) -> list[dict]:
    generator = random.Random(1)
    rows = []
    for _ in range(steps * PAIRS):
        prompt = _words(generator, generator.randrange(WORDS), PROMPT, errors=0.0)
        chosen, rejected = (_words(generator, prompt[-1], ANSWER, errors) for errors in (0.05, 0.3))
        rows.append({"prompt": _text(prompt), "chosen": _text(chosen), "rejected": _text(rejected)})
    return rows


def _completions(steps: int) -> list[dict]:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in _pairs(steps)]


def _labeled(steps: int) -> list[dict]:
    rows = [(row["prompt"], row[name], name == "chosen") for row in _pairs(steps) for name in ("chosen", "rejected")]
    return [{"prompt": prompt, "completion": text, "label": label} for prompt, text, label in rows]


def _prompts(steps: int) -> list[dict]:
    return [{"prompt": row["prompt"]} for row in _pairs(steps)]


def _completion(prompt: list[int], repetition: int) -> list[int]:
    """The ids of one of the completions of a prompt."""
    generator = random.Random(repr((prompt, repetition)))
    return [word + 3 for word in _words(generator, prompt[-1] - 3, ANSWER, errors=0.2)]


def _reward(completions: list[str], **_: Any) -> list[float]:
    """The share of words with a low number."""
    return [sum(int(word[1:]) < WORDS // 2 for word in text.split()) / ANSWER for text in completions]


GROUPS = {"num_generations": GROUP, "max_completion_length": ANSWER, "beta": 0.1, "num_iterations": 2}
CASES = {
    "SFT": Case(trl.SFTTrainer, trl.SFTConfig, _completions),
    **{
        f"DPO, {loss}": Case(trl.DPOTrainer, trl.DPOConfig, _pairs, {"loss_type": loss, "beta": 0.1, **more})
        for loss, more in {
            "sigmoid": {}, "hinge": {}, "ipo": {}, "robust": {"label_smoothing": 0.1}, "apo_zero": {},
        }.items()
    },
    "KTO": Case(trl.KTOTrainer, trl.KTOConfig, _labeled, {"beta": 0.1}),
    "GRPO, entropy bonus": Case(FixedGRPO, trl.GRPOConfig, _prompts, {**GROUPS, "entropy_coef": 0.1}),
    "RLOO": Case(FixedRLOO, trl.RLOOConfig, _prompts, GROUPS),
}  # fmt: skip
