"""`cwdpo probe` and `cwdpo eval`: what the probes and captions say about a model that is there already, on any rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cwdpo_kernels import Cooling
from cwdpo_kernels.integrations.hugging_face import attach_head
from cwdpo_trainer.config.arguments import DataArguments, ModelArguments, ProbeArguments, SamplingArguments
from cwdpo_trainer.config.loader import STAGES, read_section
from cwdpo_trainer.data.collator import PairCollator
from cwdpo_trainer.data.lengths import LengthMeter, fit_rows
from cwdpo_trainer.data.rows import Row, distinct_prompts, load_rows
from cwdpo_trainer.data.source import Source
from cwdpo_trainer.data.sources import open_source
from cwdpo_trainer.errors import require
from cwdpo_trainer.evaluation.captions import score_captions
from cwdpo_trainer.evaluation.doctor import Finding, diagnose
from cwdpo_trainer.evaluation.history import PREFIX
from cwdpo_trainer.evaluation.probes import Probes
from cwdpo_trainer.evaluation.summary import environment
from cwdpo_trainer.files import read_json, write_json
from cwdpo_trainer.models.loading import Model, load_model, load_processor
from cwdpo_trainer.negatives.sampling import caption
from cwdpo_trainer.run_folder import COOLING_FILE, MODEL_FOLDERS

LINES = {
    "logp": "log p (nats per answer)",
    "mean_logp": "log p (nats per token)",
    "entropy": "entropy (nats)",
    "top1_prob": "probability of top token",
    "accuracy": "top token right",
    "ece": "ECE",
    "cooling": "mean w_c",
    "delta_logp": "Δ log p (nats per answer)",
    "delta_mean_logp": "Δ log p (nats per token)",
    "tv": "TV",
    "js": "JS (nats)",
}
AGAINST_REFERENCE = ("_delta_logp", "_delta_mean_logp", "_tv", "_js")


@dataclass(frozen=True)
class Subject:
    """A model to measure: the one that `stage` left in a run folder, or any other; with the run's settings.

    `options` are the stage's, for the doctor. `reference` may be None: then there is nothing to compare with.
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
    def find(cls, text: str, reference: str | None = None) -> Subject:
        """The model at `text`: a run folder, the folder of a model, or a name on the Hub. Without a `reference` a
        run's is what its last stage started from, another model has none."""
        folder = Path(text)
        if (folder / "run.json").is_file():
            return cls._of_run(folder, reference)
        local = not folder.is_dir() and text[0] in "./~"
        require(not local, "command line", "RUN_OR_MODEL", "an existing folder or a name on the Hub", text)
        model, probes, sampling = ModelArguments(text), ProbeArguments(), SamplingArguments()
        return cls(text, reference, "dpo", model, None, probes, sampling, Cooling(), {}, 0)

    @classmethod
    def _of_run(cls, folder: Path, reference: str | None) -> Subject:
        where, raw = str(folder / "run.json"), read_json(folder / "run.json")["config"]
        done = [stage for stage in STAGES if (folder / MODEL_FOLDERS[stage]).is_dir()]
        require(bool(done), str(folder), "", "at least 1 finished stage", "none")
        stage = done[-1]
        sections = [read_section(where, name, raw) for name in ("model", "data", "probes", "sampling")]
        path = folder / MODEL_FOLDERS[stage]
        reference = reference or _start_of(folder, stage, raw)
        options = raw.get(stage) or {}
        return cls(str(path), reference, stage, *sections, _cooling_of(path), options, raw.get("seed", 0))


def _start_of(folder: Path, stage: str, raw: dict[str, Any]) -> str | None:
    """The model that a stage of a run started from: the other stage's, or the one that metrics.json names."""
    if stage == "dpo" and "sft" in raw:
        return str(folder / MODEL_FOLDERS["sft"])
    metrics = folder / "metrics.json"
    return read_json(metrics)["base_model"] if metrics.is_file() else None


def probe(subject: Subject, data: str, rows: int | None, json_file: Path | None) -> dict[str, Any]:
    """Measure all probe figures of a model and its reference on `data`; print a table and what the doctor finds.

    The reference is measured too, so that findings can compare. `rows`: how many, by default the run's.
    """
    source = open_source(data)
    settings = subject.probes if rows is None else replace(subject.probes, rows=rows)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    collator = PairCollator(load_processor(subject.path))
    heldout = _rows(subject, collator, source)
    probes = Probes(heldout, collator, settings, subject.sampling, subject.cooling, subject.seed)
    models = {"model": _load(subject, subject.path, device)}
    if subject.reference is not None:
        models = {"reference": _load(subject, subject.reference, device), **models}
    for model in models.values():
        attach_head(model)
    reference = next(iter(models.values()))
    probes.draw_onpolicy(reference, "own answers")
    figures = {name: probes.measure(model, reference, device, name) for name, model in models.items()}
    findings = _findings(subject, list(figures.values()))
    if subject.reference is None:  # of differences from itself nobody learns anything
        figures["model"] = {k: v for k, v in figures["model"].items() if not k.endswith(AGAINST_REFERENCE)}
    _print_table(figures, list(probes.sets))
    for finding in findings:
        print(f"found {finding.name}: {finding.evidence}; {finding.advice}")
    if not findings:
        print("the doctor found nothing")
    answers = {name: len(answers) for name, answers in probes.sets.items()}
    result = {**_header(subject, source, device), "answers": answers, "figures": figures}
    result["findings"] = [asdict(finding) for finding in findings]
    _write(json_file, result)
    return result


def evaluate(subject: Subject, data: str, rows: int | None, json_file: Path | None) -> dict[str, Any]:
    """Caption each scene of `data` (the first `rows` of them) greedily; print exact match and CIDEr."""
    source = open_source(data)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    collator = PairCollator(load_processor(subject.path))
    scenes = distinct_prompts(_rows(subject, collator, source))[:rows]
    model = _load(subject, subject.path, device)
    limit, size = subject.sampling.max_new_tokens, subject.probes.batch_size
    texts = caption(model, collator, scenes, limit, size, "captions")
    scores = score_captions(texts, scenes)
    print(f"{subject.path}: {len(scenes)} captions, exact match {scores.exact_match:.3f}, CIDEr {scores.cider:.1f}")
    result = {**_header(subject, source, device), "exact_match": scores.exact_match, "cider": scores.cider}
    result["captions"] = [
        _captioned(row, text, match) for row, text, match in zip(scenes, texts, scores.matches, strict=True)
    ]
    _write(json_file, result)
    return result


def _rows(subject: Subject, collator: PairCollator, source: Source) -> list[Row]:
    """The rows of a data set, as the subject's run would have them."""
    settings = subject.data
    rows = load_rows(source, print if settings is not None and settings.skip_bad_rows else None)
    if settings is None or settings.max_length is None:
        return rows
    fit = fit_rows(rows, LengthMeter(collator), settings.max_length, settings.over_length)
    print(fit.report(source.name, settings.max_length))
    return fit.rows


def _captioned(row: Row, text: str, match: bool) -> dict[str, Any]:
    return {"row": Path(row.where).name, "caption": text, "references": row.references, "match": match}


def _cooling_of(folder: Path) -> Cooling:
    """What stage 2 trained with, which may have been measured; a model that it did not make has the default."""
    path = folder / COOLING_FILE
    return Cooling(**read_json(path)) if path.is_file() else Cooling()


def _load(subject: Subject, path: str, device: torch.device) -> Model:
    return load_model(subject.model, path, None, trainable=False).to(device).eval()


def _findings(subject: Subject, probes: Sequence[dict[str, float]]) -> list[Finding]:
    history = [
        {"step": step, **{PREFIX + key: value for key, value in probe.items()}} for step, probe in enumerate(probes)
    ]
    return diagnose(subject.stage, history, subject.options)


def _print_table(figures: dict[str, dict[str, float]], sets: list[str]) -> None:
    """A column for each set of answers; the reference's figure -> the model's, where there are two."""
    model, reference = figures["model"], figures.get("reference")
    print(f"\n{'':27}" + "".join(f"{name:>20}" for name in sets))
    for key, title in LINES.items():
        cells = []
        for name in sets:
            value = model.get(f"{name}_{key}")
            cell = "-" if value is None else f"{value:.3f}"
            both = value is not None and reference is not None and f"_{key}" not in AGAINST_REFERENCE
            cells.append(f"{reference[f'{name}_{key}']:.3f} -> {cell}" if both else cell)
        if set(cells) != {"-"}:
            print(f"{title:27}" + "".join(f"{cell:>20}" for cell in cells))
    print("reference -> model\n" if reference is not None else "no reference to compare with (--reference)\n")


def _header(subject: Subject, source: Source, device: torch.device) -> dict[str, Any]:
    return {
        "model": subject.path,
        "reference": subject.reference,
        "data": {"name": source.name, "digest": source.digest()},
        "environment": environment(device),
    }


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        write_json(path, result)
        print(f"all figures: {path}")
