"""The results of a run: metrics.json, probes.csv, predictions.jsonl, dynamics.png, model cards and a printed table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.evaluation.captions import CaptionScores, score_captions
from cwdpo_trainer.evaluation.card import Origin, write_card
from cwdpo_trainer.evaluation.doctor import Finding, diagnose
from cwdpo_trainer.evaluation.history import History, probe_entries
from cwdpo_trainer.evaluation.plot import draw_dynamics
from cwdpo_trainer.evaluation.summary import NOTE, TITLES, environment, labels_of, stage_metrics, table, too_few_lines
from cwdpo_trainer.files import replacing, write_json, write_text
from cwdpo_trainer.reporter import say
from cwdpo_trainer.run_folder import LABEL_OF_STAGE, RunFolder


@dataclass
class Results:
    """What a run has measured.

    `captions` by model label (start, after_sft, after_cwdpo), one for each row in `prompts`; by stage, log histories,
    settings and the number of held-out answers of each set.
    """

    prompts: list[Row]
    captions: dict[str, list[str]]
    histories: dict[str, History]
    settings: Mapping[str, Mapping[str, Any]]
    answers: Mapping[str, Mapping[str, int]]
    origin: Origin
    seed: int
    device: str


def write_report(folder: RunFolder, results: Results) -> None:
    """Write all result files into the run folder. metrics.json comes last: its presence means that all are there."""
    scores = {label: score_captions(texts, results.prompts) for label, texts in results.captions.items()}
    probes = {stage: probe_entries(history) for stage, history in results.histories.items()}
    write_text(folder.predictions_file, _predictions(results, scores, folder.path))
    write_text(folder.probes_file, _probes_csv(probes))
    with replacing(folder.plot_file) as temporary:
        draw_dynamics(temporary, results.histories)
    metrics = _metrics(results, scores, probes)
    for stage in results.histories:
        model = folder.model(stage)
        name = f"{folder.path.resolve().name}-{model.name}"
        write_card(model, stage, name, metrics, results.origin, folder.plot_file)
    write_json(folder.metrics_file, metrics)


def _metrics(results: Results, scores: dict[str, CaptionScores], probes: dict[str, History]) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        label: {**score.metrics(), "captions": len(results.prompts)} for label, score in scores.items()
    }
    for stage, entries in probes.items():
        metrics[LABEL_OF_STAGE[stage]] |= stage_metrics(results.histories[stage], entries[-1], results.answers[stage])
    metrics["start"] |= _probed_start(results, probes)
    before, after = (metrics[label] for label in list(scores)[-2:])
    metrics["delta"] = {key: after[key] - before[key] for key in ("exact_match", "cider")}
    metrics["findings"] = [
        asdict(finding)
        for stage, history in results.histories.items()
        for finding in diagnose(stage, history, results.settings[stage], results.answers[stage])
    ]
    metrics["environment"] = environment(results.device)
    metrics["base_model"] = results.origin.base_model
    metrics["data"] = dict(results.origin.digests)
    metrics["seed"] = results.seed
    metrics["timing"] = {
        f"{stage}_train_seconds": entry["train_runtime"]  # of all processes
        for stage, history in results.histories.items()
        for entry in history
        if "train_runtime" in entry
    }
    return metrics


def _probed_start(results: Results, probes: dict[str, History]) -> dict[str, Any]:
    """The probe of the model before training: that of the first stage at step 0. Empty without eval_on_start."""
    stage, (first, *_) = next(iter(probes.items()))
    if first["step"] > 0:
        return {"probes": {}, "answers": {}}
    return {"probes": first, "answers": dict(results.answers[stage])}


def _predictions(results: Results, scores: dict[str, CaptionScores], folder: Path) -> str:
    lines = []
    for index, row in enumerate(results.prompts):
        line: dict[str, Any] = {
            "row": Path(row.where).name,
            "prompt": row.prompt,
            "images": [image.name_from(folder) for image in row.images],
            "references": row.references,
        }
        for label, texts in results.captions.items():
            line[f"caption_{label}"] = texts[index]
            line[f"match_{label}"] = scores[label].matches[index]
        lines.append(json.dumps(line) + "\n")
    return "".join(lines)


def _probes_csv(probes: dict[str, History]) -> str:
    entries = [{"stage": stage, **entry} for stage, of_stage in probes.items() for entry in of_stage]
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(entries)
    return text.getvalue()


def print_table(metrics: dict[str, Any], folder: RunFolder, finished: bool) -> None:
    """Print the main metrics of a run and the doctor's findings. `finished`: this call had nothing left to train."""
    labels = labels_of(metrics)
    if finished:
        say(f"{folder}: this run is finished, nothing is left to train")
    lines = table(metrics)
    width, n_width = (max((len(getattr(line, name)) for line in lines), default=0) for name in ("title", "n"))
    say(f"\n{'':{width}}  {'n':>{n_width}}" + "".join(f"{TITLES[label]:>14}" for label in labels))
    for line in lines:
        say(f"{line.title:<{width}}  {line.n:>{n_width}}" + "".join(f"{line.text(label):>14}" for label in labels))
    say(NOTE)
    for text in too_few_lines(metrics):
        say(text)
    for finding in metrics["findings"]:
        say(f"found {Finding(**finding)}")
    say(f"learning dynamics: {folder.plot_file}\n")
