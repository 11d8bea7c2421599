"""`cwdpo probe` and `cwdpo eval`: measure a finished model on any rows, with the probes or by its captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cwdpo_kernels import Cooling
from cwdpo_kernels.integrations.hugging_face import attach_head
from cwdpo_trainer.config.arguments import DataArguments, ModelArguments, ProbeArguments, SamplingArguments
from cwdpo_trainer.config.sections import read_section
from cwdpo_trainer.data.collator import PairCollator
from cwdpo_trainer.data.lengths import LengthMeter, fit_rows
from cwdpo_trainer.data.rows import Row, distinct_prompts, load_rows
from cwdpo_trainer.data.screening import bad_rows, without_bad_rows
from cwdpo_trainer.data.source import Source
from cwdpo_trainer.data.sources import open_source
from cwdpo_trainer.errors import require
from cwdpo_trainer.evaluation.captions import score_captions
from cwdpo_trainer.evaluation.doctor import Finding, diagnose, too_few
from cwdpo_trainer.evaluation.history import PREFIX
from cwdpo_trainer.evaluation.probes import Probes
from cwdpo_trainer.evaluation.summary import environment
from cwdpo_trainer.files import read_json, user_path, write_json
from cwdpo_trainer.models.loading import Model, folder_or_name, load_model, load_processor, move
from cwdpo_trainer.negatives.sampling import caption
from cwdpo_trainer.reporter import say
from cwdpo_trainer.run_folder import COOLING_FILE, RunFolder

METRIC_TITLES = {  # of the table's lines, by metric
    "logp": "log p (nats per answer)",
    "mean_logp": "mean log p (nats per token)",
    "entropy": "entropy (nats per token)",
    "top1_prob": "top-1 probability",
    "accuracy": "top-1 accuracy",
    "ece": "ECE",
    "cooling": "mean cooling weight w_c",
    "delta_logp": "Δ log p (nats per answer)",
    "delta_mean_logp": "Δ mean log p (nats per token)",
    "tv": "TV",
    "js": "JS (nats)",
}
AGAINST_REFERENCE = ("_delta_logp", "_delta_mean_logp", "_tv", "_js")


@dataclass(frozen=True)
class EvalTarget:
    """A model to measure, and the settings to do it with: those of its run, or the defaults.

    `path`, `reference`: folders or Hub names; without a reference there is nothing to compare with. `stage` made the
    model, with `options`, which the doctor reads. `data` is None for a model without a run.
    """

    path: str
    reference: str | None
    stage: str
    model: ModelArguments
    data: DataArguments | None
    probes: ProbeArguments
    sampling: SamplingArguments
    cooling: Cooling
    options: dict[str, Any]
    seed: int

    @classmethod
    def find(cls, text: str, reference: str | None = None) -> EvalTarget:
        """The model at `text`: a run folder (its last finished stage), a model folder, or a name on the Hub.

        The default reference of a run is the model that its last stage started from. Other models have none.
        """
        if reference is not None:
            reference = folder_or_name("command line", "--reference", reference)
        folder = RunFolder(user_path(text))
        if folder.is_run():
            return cls._of_run(folder, reference)
        text = folder_or_name("command line", "RUN_OR_MODEL", text)
        model, probes, sampling = ModelArguments(text), ProbeArguments(), SamplingArguments()
        return cls(text, reference, "dpo", model, None, probes, sampling, Cooling(), {}, 0)

    @classmethod
    def _of_run(cls, folder: RunFolder, reference: str | None) -> EvalTarget:
        where, raw = str(folder.record_file), folder.recorded_config()
        done = folder.done_stages()
        require(bool(done), str(folder), "", "at least 1 finished stage", "none")
        stage = done[-1]
        folder.verify_model(stage)
        model, data, probes, sampling = (
            read_section(where, name, raw) for name in ("model", "data", "probes", "sampling")
        )
        path = folder.model(stage)
        reference = reference or _start_of(folder, stage, raw)
        cooling, options, seed = _cooling_of(path), raw.get(stage) or {}, raw.get("seed", 0)
        return cls(str(path), reference, stage, model, data, probes, sampling, cooling, options, seed)


def _start_of(folder: RunFolder, stage: str, raw: dict[str, Any]) -> str | None:
    """The model that a run's `stage` started from: that of stage 1, or the base model in metrics.json."""
    if stage == "dpo" and "sft" in raw:
        return str(folder.model("sft"))
    return folder.metrics()["base_model"] if folder.metrics_file.is_file() else None


def probe(target: EvalTarget, data: str, rows: int | None, json_file: Path | None) -> dict[str, Any]:
    """Measure all probe metrics of a model and its reference on `data`; print a table and the doctor's findings.

    `rows`: how many rows to measure; the default is the run's. Returns what `json_file` gets.
    """
    source, device = open_source(data), _device()
    settings = target.probes if rows is None else replace(target.probes, rows=rows)
    collator = PairCollator(load_processor(target.path))
    probes = Probes(
        _load_rows(target, collator, source), collator, settings, target.sampling, target.cooling, target.seed
    )
    metrics = _measure(target, probes, device)
    answers = probes.answer_counts()
    findings = _findings(target, list(metrics.values()), answers)
    if target.reference is None:  # the model was its own reference
        metrics["model"] = {k: v for k, v in metrics["model"].items() if not k.endswith(AGAINST_REFERENCE)}
    _print_table(metrics, answers)
    few = too_few(answers)
    if few is not None:
        say(few)
    for finding in findings:
        say(f"found {finding.name}: {finding.text}")
    if not findings and few is None:
        say("the doctor found nothing")
    result = {
        **_header(target, source, device),
        "answers": answers,
        "metrics": metrics,
        "findings": [asdict(finding) for finding in findings],
    }
    _write(json_file, result)
    return result


def _measure(target: EvalTarget, probes: Probes, device: torch.device) -> dict[str, dict[str, float]]:
    """The metrics of "reference", if there is one, and of "model"."""
    paths = {"reference": target.reference, "model": target.path}
    models = {name: _load(target, path, device) for name, path in paths.items() if path is not None}
    for model in models.values():
        attach_head(model)
    reference = next(iter(models.values()))
    probes.draw_onpolicy(reference, "sampling")
    return {name: probes.measure(model, reference, device, name) for name, model in models.items()}


def evaluate(target: EvalTarget, data: str, rows: int | None, json_file: Path | None) -> dict[str, Any]:
    """Caption each distinct prompt of `data` (the first `rows`) greedily; print exact match and CIDEr.

    Returns what `json_file` gets.
    """
    source, device = open_source(data), _device()
    collator = PairCollator(load_processor(target.path))
    prompts = distinct_prompts(_load_rows(target, collator, source))[:rows]
    model = _load(target, target.path, device)
    limit, size = target.sampling.max_new_tokens, target.probes.batch_size
    texts = caption(model, collator, prompts, limit, size, "captions")
    scores = score_captions(texts, prompts)
    say(f"{target.path}: {len(prompts)} captions, exact match {scores.exact_match:.3f}, CIDEr {scores.cider:.1f}")
    captions = [
        {"row": Path(row.where).name, "caption": text, "references": row.references, "match": match}
        for row, text, match in zip(prompts, texts, scores.matches, strict=True)
    ]
    result = {
        **_header(target, source, device),
        **scores.metrics(),
        "captions": captions,
    }
    _write(json_file, result)
    return result


def _device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _load_rows(target: EvalTarget, collator: PairCollator, source: Source) -> list[Row]:
    """The rows of a dataset, treated as in the target's run: bad rows skipped, long ones made to fit."""
    settings = target.data
    skipped = say if settings is not None and settings.skip_bad_rows else None
    rows = load_rows(source, skipped)
    rows = without_bad_rows(source.name, rows, bad_rows(rows, collator), skipped)
    if settings is None or settings.max_length is None:
        return rows
    fit = fit_rows(rows, LengthMeter(collator), settings.max_length, settings.over_length)
    say(fit.report(source.name, settings.max_length))
    return fit.rows


def _cooling_of(folder: Path) -> Cooling:
    """The cooling that stage 2 trained with. Models that it did not make get the default."""
    path = folder / COOLING_FILE
    return Cooling(**read_json(path)) if path.is_file() else Cooling()


def _load(target: EvalTarget, path: str, device: torch.device) -> Model:
    model = load_model(target.model, path, None, trainable=False)
    move(model, device)
    return model.eval()


def _findings(target: EvalTarget, probes: Sequence[dict[str, float]], answers: Mapping[str, int]) -> list[Finding]:
    history = [
        {"step": step, **{PREFIX + key: value for key, value in probe.items()}} for step, probe in enumerate(probes)
    ]
    return diagnose(target.stage, history, target.options, answers)


def _print_table(metrics: dict[str, dict[str, float]], answers: Mapping[str, int]) -> None:
    """Print a column per set of answers, with its n. With a reference, cells are "reference -> model"."""
    model, reference = metrics["model"], metrics.get("reference")
    heads = {name: f"{name} (n = {count})" for name, count in answers.items()}
    width = max(20, *(len(head) + 2 for head in heads.values()))
    say(f"\n{'':30}" + "".join(f"{head:>{width}}" for head in heads.values()))
    for key, title in METRIC_TITLES.items():
        cells = []
        for name in heads:
            value = model.get(f"{name}_{key}")
            cell = "-" if value is None else f"{value:.3f}"
            if value is not None and reference is not None and f"_{key}" not in AGAINST_REFERENCE:
                cell = f"{reference[f'{name}_{key}']:.3f} -> {cell}"
            cells.append(cell)
        if set(cells) != {"-"}:
            say(f"{title:30}" + "".join(f"{cell:>{width}}" for cell in cells))
    say("reference -> model\n" if reference is not None else "no reference to compare with (--reference)\n")


def _header(target: EvalTarget, source: Source, device: torch.device) -> dict[str, Any]:
    return {
        "model": target.path,
        "reference": target.reference,
        "data": {"name": source.name, "digest": source.digest()},
        "environment": environment(device),
    }


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        write_json(path, result)
        say(f"all metrics: {path}")
