"""The model card, saved with each model: base model, method, metrics, the doctor's findings, settings and versions."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import TrainingArguments

from cwdpo_kernels import CoolingWeighted
from cwdpo_trainer.config.sections import without_secrets
from cwdpo_trainer.errors import require, shorten
from cwdpo_trainer.evaluation.doctor import Finding, diagnose
from cwdpo_trainer.evaluation.history import History, probe_entries
from cwdpo_trainer.evaluation.plot import draw_dynamics
from cwdpo_trainer.evaluation.summary import NOTE, TITLES, environment, labels_of, stage_metrics, table, too_few_lines
from cwdpo_trainer.files import replacing, write_text
from cwdpo_trainer.models.adapters import ADAPTER_FILE
from cwdpo_trainer.run_folder import LABEL_OF_STAGE

CARD, PLOT = "README.md", "dynamics.png"
LONGEST_NAME = 200  # characters of a model's name
SETS = (
    "Answers: `chosen` are right; `onpolicy` are wrong samples of the model that a stage started from; the others are "
    "rejected answers, by `negative_source`. All values are means over n."
)
PAPER = "(CW-DPO, [arXiv 2510.11978](https://arxiv.org/abs/2510.11978))"
METHODS = {
    "sft": f"constrained supervised fine-tuning with gentle negatives, stage 1 of Cooling-Weighted DPO\n{PAPER}",
    "dpo": f"Cooling-Weighted DPO\n{PAPER}",
}


@dataclass(frozen=True)
class Origin:
    """Where a model comes from.

    `base_model`: a name on the Hub, or a folder. `settings`: the run's config as in its YAML file. `digests`: hashes
    of the training and the held-out data, by name. `text_only`: the model reads no images.
    """

    base_model: str
    settings: Mapping[str, Any]
    digests: Mapping[str, str]
    text_only: bool = False

    @property
    def task(self) -> str:
        """The task as the Hub names it."""
        return "text-generation" if self.text_only else "image-text-to-text"


def write_card(folder: Path, stage: str, name: str, metrics: Mapping[str, Any], origin: Origin, plot: Path) -> None:
    """Write README.md and a copy of `plot` into `folder`, which holds the model of `stage`.

    `metrics` has the layout of metrics.json. The card omits later stages.
    """
    if plot != folder / PLOT:
        with replacing(folder / PLOT) as temporary:
            shutil.copyfile(plot, temporary)
    write_text(folder / CARD, str(make_card(stage, name, metrics, origin, (folder / ADAPTER_FILE).exists())))


def write_stage_card(
    folder: Path, stage: str, name: str, history: History, settings: Mapping[str, Any], answers: Mapping[str, int],
    origin: Origin, device: str,
) -> None:  # fmt: skip
    """Write the card of a stage from its log history and the number of held-out answers by set. Only a finished run has
    scores of captions."""
    probes = probe_entries(history)
    require(bool(probes), str(folder), "", "probes of a trained stage for its card", "none")
    metrics = {
        LABEL_OF_STAGE[stage]: stage_metrics(history, probes[-1], answers),
        "findings": [asdict(finding) for finding in diagnose(stage, history, settings, answers)],
        "environment": environment(device),
    }
    with replacing(folder / PLOT) as temporary:
        draw_dynamics(temporary, {stage: history})
    write_card(folder, stage, name, metrics, origin, folder / PLOT)


def make_card(stage: str, name: str, metrics: Mapping[str, Any], origin: Origin, adapter: bool) -> ModelCard:
    """The card: metadata for the Hub, and the text. It contains no access tokens."""
    stages = ["sft"] if stage == "sft" else list(LABEL_OF_STAGE)
    later = {label for of_stage, label in LABEL_OF_STAGE.items() if of_stage not in stages}
    shown = {label: metrics[label] for label in labels_of(metrics) if label not in later}
    findings = [Finding(**finding) for finding in metrics["findings"] if finding["stage"] in stages]
    is_folder = Path(origin.base_model).is_dir()  # the Hub accepts only its own names as base_model
    name = shorten(name, LONGEST_NAME)
    base = shorten(Path(origin.base_model).name if is_folder else origin.base_model, LONGEST_NAME)
    data = ModelCardData(
        model_name=name,
        base_model=None if is_folder else base,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=origin.task,
        tags=["cwdpo", "dpo", "preference-optimization", *_tags(origin, adapter)],
        eval_results=_eval_results(shown, LABEL_OF_STAGE[stage], origin.task),
    )
    settings = yaml.safe_dump(_settings(origin), sort_keys=False, allow_unicode=True).strip()
    made_with = {
        **metrics["environment"],
        **{f"data.{name} (digest)": digest for name, digest in origin.digests.items()},
    }
    text = f"""# {_escaped(name)}

Fine-tuned from {_code(base)} with {_method(stage, origin.settings)}, using cwdpo_kernels.

## Metrics on held-out rows

{_markdown(["", "n", *(TITLES[label] for label in shown)], _table_cells(shown))}

{SETS} {NOTE}

![Learning dynamics]({PLOT})

## What the doctor found

{_bullets([*too_few_lines(shown), *map(str, findings)]) or "Nothing."}

## Settings

{_fenced(settings, "yaml")}

## Made with

{_markdown(["", "version or value"], made_with.items())}
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _method(stage: str, settings: Mapping[str, Any]) -> str:
    """What the stage did, as a part of a sentence. `settings`: the run's config."""
    loss = (settings.get(stage) or {}).get("loss", CoolingWeighted.name) if stage == "dpo" else CoolingWeighted.name
    return METHODS[stage] if loss == CoolingWeighted.name else f"the preference loss `{loss}`"


def changed_settings(args: TrainingArguments) -> dict[str, Any]:
    """The options of a stage that differ from their defaults, for a card without a config file."""
    defaults = {
        spec.name: spec.default_factory() if spec.default_factory is not MISSING else spec.default
        for spec in fields(args)
        if spec.default is not MISSING or spec.default_factory is not MISSING
    }
    return {key: value for key, value in args.to_dict().items() if defaults.get(key) != value}


def _tags(origin: Origin, adapter: bool) -> list[str]:
    return ([] if origin.text_only else ["vision-language"]) + (["lora"] if adapter else [])


def _eval_results(shown: Mapping[str, Any], label: str, task: str) -> list[EvalResult]:
    lines = [line for line in table(shown) if line.values[label] is not None]
    return [
        EvalResult(
            task_type=task, dataset_type="preferences", dataset_name="held-out rows",
            metric_type=line.key, metric_name=f"{line.title}, n = {line.n}", metric_value=line.values[label],
        )
        for line in lines
    ]  # fmt: skip


def _table_cells(shown: Mapping[str, Any]) -> list[list[str]]:
    return [[line.title, line.n, *(line.text(label) for label in shown)] for line in table(shown)]


def _settings(origin: Origin) -> dict[str, Any]:
    """Without access tokens and passwords, the path of the run folder and the name of the home folder."""
    settings = {key: value for key, value in origin.settings.items() if key != "output_dir"}
    return _without_home(without_secrets(settings), str(Path.home()))


def _without_home(value: Any, home: str) -> Any:
    """`value` with `~` for the home folder at the start of each text."""
    if isinstance(value, Mapping):
        return {key: _without_home(one, home) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_home(one, home) for one in value]
    is_inside = isinstance(value, str) and len(home) > 1 and f"{value}/".startswith(f"{home}/")
    return "~" + value[len(home) :] if is_inside else value


def _escaped(text: str) -> str:
    """`text` on one line, as Markdown that shows it: no links, HTML, tables or emphasis."""
    return re.sub(r"([\\`*<>\[\]|~&$]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """`text` as code within a line."""
    ticks = _ticks(text, 1)
    return f"{ticks} {text} {ticks}" if "`" in text else f"{ticks}{text}{ticks}"


def _fenced(text: str, language: str) -> str:
    """`text` as a block of code."""
    ticks = _ticks(text, 3)
    return f"{ticks}{language}\n{text}\n{ticks}"


def _ticks(text: str, least: int) -> str:
    """More backticks than `text` has in a row, so that it cannot end the code."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _bullets(lines: Iterable[str]) -> str:
    # Findings are sentences of ours with names of the user's, so only HTML is escaped.
    return "\n".join("- " + re.sub(r"<(?=[A-Za-z/!?])", "&lt;", " ".join(line.split())) for line in lines)


def _markdown(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [[_escaped(str(cell)) for cell in cells] for cells in (head, *rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], ["---"] * len(head), *lines[1:]))
