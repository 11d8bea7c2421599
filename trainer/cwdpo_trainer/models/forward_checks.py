"""Checks a model's forward on the first rows: that it predicts each token of an answer from earlier tokens only (a
model that sees later ones would learn to copy), and whether it can encode each prompt once for all its answers.

The setting `model.prefix_sharing` has three values:

    off    each answer has its own copy of the prompt
    on     answers share their prompt; an error if the model cannot do that
    auto   answers share their prompt if that is exact on the first rows, and their prompts are long enough

Sharing counts as exact if log-probs equal those of separate sequences within rounding: 1e-4 nats, or 4 eps
max |log-prob| in the dtype of the hidden states, whichever is larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from cwdpo_kernels import IGNORE_INDEX, Head, linear_logprob
from cwdpo_kernels.integrations.hugging_face import evaluating, rounding_tolerance
from cwdpo_kernels.integrations.shared_prefix import (
    TreesUnsupported,
    compare_forwards,
    enable_trees,
    why_no_trees,
)
from cwdpo_trainer.data.collator import PairCollator, to_device
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.errors import InputError, describe

LOOKED_AT = 4  # rows whose prompt lengths are averaged
COMPARED = 2  # of these rows: log-probs are compared on them
SHORTEST_PROMPT = 64  # tokens: `auto` shares from this average length on (see docs/notes.md)


class Choice(NamedTuple):
    """Whether prompts are shared, and why or why not."""

    is_shared: bool
    reason: str

    def __str__(self) -> str:
        return f"prefix sharing {'on' if self.is_shared else 'off'}: {self.reason}"


def choose_sharing(
    setting: str, models: Sequence[nn.Module], forward: nn.Module, collator: PairCollator, rows: Sequence[Row],
    device: torch.device, is_compiled: bool = False,
) -> Choice:  # fmt: skip
    """Decide whether prompts are shared, by `setting` and the first of `rows`. If so, enable token trees in `models`.

    Args:
        setting: `auto`, `on` or `off`
        models: policy and reference, of the same architecture
        forward: one of them, maybe wrapped, on `device` and in evaluation mode
        is_compiled: whether torch_compile is on, which rules sharing out

    All processes get the choice of the first one. Raises `InputError` if the setting is `on` and the models cannot
    share prompts.
    """
    if setting == "off":
        return Choice(False, "model.prefix_sharing is off")
    reason = "torch_compile is on" if is_compiled else why_no_trees(models[0])
    if reason is None:
        choice = _on_first_rows(setting, models, forward, collator, rows[:LOOKED_AT], device)
    else:
        choice = Choice(False, reason)
    (choice,) = broadcast_object_list([choice])
    if setting == "on" and not choice.is_shared:
        raise InputError("config", "model.prefix_sharing", f"auto or off, because {choice.reason}", "on")
    return choice


def predict_sharing(setting: str, model: nn.Module, prompts: Sequence[int], is_compiled: bool) -> bool:
    """What `choose_sharing` will choose if log-probs turn out equal. Does not run `model`.

    `prompts`: the lengths of the rows' prompts in tokens, in the order of the rows.
    """
    if setting == "off" or is_compiled or why_no_trees(model) is not None:
        return False
    first = prompts[:LOOKED_AT]
    return setting == "on" or sum(first) >= SHORTEST_PROMPT * len(first)


def _on_first_rows(
    setting: str, models: Sequence[nn.Module], forward: nn.Module, collator: PairCollator, rows: Sequence[Row],
    device: torch.device,
) -> Choice:  # fmt: skip
    length = collator.prompts(rows)["attention_mask"].sum(1).float().mean().item()
    if setting == "auto" and length < SHORTEST_PROMPT:
        return Choice(False, f"prompts of {length:.0f} tokens; sharing pays from {SHORTEST_PROMPT} on")
    try:
        for model in models:
            enable_trees(model)
        shared = collator.on_trees(models[0])
        difference, tolerance = compare_sharing(forward, shared, rows[:COMPARED], device)
    except TreesUnsupported as error:
        return Choice(False, str(error))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's own code may raise any type on inputs that it does not expect
        return Choice(False, f"{type(models[0]).__name__} fails on token trees: {describe(error)}")
    found = f"log-probs within {difference:.1e} nats of those of separate sequences (tolerance {tolerance:.1e})"
    if not difference <= tolerance:
        name = type(models[0]).__name__
        return Choice(False, f"{name}'s log-probs are off by {difference:.2g} nats ({tolerance:.1e} allowed)")
    return Choice(True, f"prompts of {length:.0f} tokens; {found}")


def compare_sharing(
    forward: nn.Module, collator: PairCollator, rows: Sequence[Row], device: torch.device
) -> tuple[float, float]:
    """The largest difference between token log-probs with shared prompts and with separate sequences, and the
    tolerance, in nats. `collator` makes token trees, and `forward` has them enabled."""
    inputs = collator(rows)
    prompts = to_device(inputs["prompts"], device)
    parts = (prompts, inputs["chosen"], inputs["rejected"])
    return compare_forwards(forward, collator.join_padded(*parts).to(device), collator.join(*parts).to(device))


@torch.no_grad()
def check_causal(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> float:
    """Check that log-probs of answers stay the same when the last token of each answer changes.

    Args:
        model: takes `head_op`
        inputs: S rows, padded on the right
        labels: [S, T], aligned with the hidden states that predict them

    Returns the largest change, in nats. Raises `InputError` if it exceeds rounding: then the model attends in both
    directions, for example because the token types mark the answer as part of a prompt.
    """

    def op(hidden: Tensor, head: Head) -> tuple[Tensor, torch.dtype]:
        return linear_logprob(hidden, head, labels), hidden.dtype

    changed = dict(inputs, input_ids=_change_last_tokens(inputs["input_ids"], labels))
    with evaluating(model):
        (logp, dtype), (other, _) = (model(**batch, head_op=op) for batch in (inputs, changed))
    worst = (logp - other).abs().max().item()
    tolerance = rounding_tolerance(logp.abs().max().item(), dtype)
    if not worst <= tolerance:
        expected = f"a change <= {tolerance:.1e} nats when only a later token changes"
        got = f"{worst:.3g}: the model attends to later tokens of an answer"
        raise InputError(type(model).__name__, "log-probs of answers", expected, got)
    return worst


def _change_last_tokens(ids: Tensor, labels: Tensor) -> Tensor:
    """Replace the last token of each answer by the answer's first token.

    The last token is the label of the row's last labeled position, so it lies one further right. No label is predicted
    from it.
    """
    ids = ids.clone()
    for row, labeled in enumerate(labels != IGNORE_INDEX):
        positions = labeled.nonzero().flatten().tolist()
        if positions:
            ids[row, positions[-1] + 1] = labels[row, positions[0]]
    return ids
