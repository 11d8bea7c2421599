"""A run: check everything, train the stages that are not done yet, measure, write the results.

The run folder holds

    run.json            the configuration and digests of the data: a folder continues one run only
    checkpoints/STAGE/  the library's checkpoints; one with a file COMPLETE was written to its end; in dpo/ also
                        negatives_PROCESS.jsonl: where each pair's negative came from, step by step
    reference_cache/    log-probs under stage 2's reference, unless dpo.reference_cache names another place
    sft/, cwdpo/        the model after each stage, with processor, trainer state and card: there when it is done
    metrics.json, probes.csv, predictions.jsonl, dynamics.png   see report.py
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoProcessor, ProcessorMixin, set_seed

from cwdpo_kernels import Cooling
from cwdpo_trainer.arguments import StageArguments
from cwdpo_trainer.card import Origin
from cwdpo_trainer.checkpoints import newest_checkpoint
from cwdpo_trainer.collator import PairCollator
from cwdpo_trainer.config import STAGES, RunConfig, prepare
from cwdpo_trainer.data import Row, distinct_prompts, load_rows, split_rows
from cwdpo_trainer.dpo import CWDPOTrainer
from cwdpo_trainer.errors import InputError, require
from cwdpo_trainer.files import read_json, replacing_folder, write_json
from cwdpo_trainer.lengths import LengthMeter, fit_rows
from cwdpo_trainer.models import Model, freeze_reference, load_model
from cwdpo_trainer.probes import Probes
from cwdpo_trainer.report import Results, is_reported, print_table, write_report
from cwdpo_trainer.sampling import caption
from cwdpo_trainer.server import AnswerServer
from cwdpo_trainer.sft import ConstrainedSFTTrainer
from cwdpo_trainer.sources import open_source
from cwdpo_trainer.stages import StageTrainer
from cwdpo_trainer.summary import COOLING_FILE, LABEL_OF_STAGE, MODEL_FOLDERS

STATE_FILE = "trainer_state.json"


@dataclass
class _Inputs:
    """What a run needs beside its configuration, all of it checked."""

    rows: dict[str, list[Row]]
    heldout: list[Row]
    model_path: str
    collator: PairCollator
    digests: dict[str, str]


def run(config: RunConfig, only: str | None = None) -> dict[str, Any]:
    """Train the stages of `config` (or the one named `only`); returns what metrics.json holds.

    A run folder that exists is continued: stages that are done are not repeated, and a stage that was cut
    off goes on from its newest complete checkpoint. Raises `InputError` on wrong input, before anything is
    written to the run folder.
    """
    stages = [name for name in STAGES if getattr(config, name) is not None]
    wanted = [only] if only else stages
    require(wanted[0] in stages, "configuration", "the file", "a section", wanted[0], ", ".join(stages))
    folder = config.output_dir
    args: StageArguments = getattr(config, wanted[0])
    several = "one process a GPU (accelerate launch), or one GPU (CUDA_VISIBLE_DEVICES)"
    require(
        args.n_gpu <= 1, "run", "this machine", "as many GPUs as processes:", several, f"{args.n_gpu} in one process"
    )
    with args.main_process_first(local=False):
        prepare(config)
    inputs = _load_inputs(config, stages)
    check_folder(config, inputs.digests)
    needs_sft = wanted == ["dpo"] and "sft" in stages and not _is_done(folder, "sft")
    require(not needs_sft, str(folder), "stage sft", "state", "done (run `cwdpo sft` first)", "not done")
    finished = is_reported(folder, wanted)
    if not finished:
        if config.sampling.server is not None and "dpo" in wanted:
            AnswerServer.open(config.sampling.server, inputs.rows["dpo"])  # rather than after stage 1
        PartialState().wait_for_everyone()  # nobody looks at the folder while it is written to
        if args.should_save:
            write_json(folder / "run.json", _record(config, inputs.digests))
        _train_stages(config, inputs, wanted)
        with args.main_process_first(local=False):
            if args.should_save:
                write_report(folder, _results(config, inputs))
    metrics = read_json(folder / "metrics.json")
    if args.should_save:
        print_table(metrics, folder, finished)
    return metrics


def _load_inputs(config: RunConfig, stages: Sequence[str]) -> _Inputs:
    sources = {name: open_source(getattr(config.data, name), config.base) for name in ("train", "heldout")}
    first: StageArguments = getattr(config, stages[0])
    tell = print if first.should_save else lambda _: None
    train, heldout = (load_rows(source, tell if config.data.skip_bad_rows else None) for source in sources.values())
    path = model_path(config)
    collator = PairCollator(load_processor(path))
    if config.data.max_length is not None:
        meter, limit = LengthMeter(collator), config.data.max_length
        fits = [fit_rows(rows, meter, limit, config.data.over_length) for rows in (train, heldout)]
        for source, fit in zip(sources.values(), fits, strict=True):
            tell(fit.report(source.name, limit))
        train, heldout = (fit.rows for fit in fits)
    if len(stages) == 2:
        shares = split_rows(train, config.data.sft_fraction, config.seed)
        rows = dict(zip(STAGES, shares, strict=True))
    else:
        rows = {stages[0]: train}
    digests = {name: source.digest() for name, source in sources.items()}
    return _Inputs(rows, heldout, path, collator, digests)


def load_processor(path: str) -> ProcessorMixin:
    """The processor of the model at `path`. Raises `InputError` where there is none for text and images."""
    try:
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:  # some processors need torchvision
        message = f"model: expected path to have a vision-language model and its processor, got {path}"
        raise InputError(f"{message} ({' '.join(str(error).split())[:200]})") from error
    usable = hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")
    require(usable, path, "the processor", "parts", "tokenizer and image_processor", type(processor).__name__)
    return processor


def model_path(config: RunConfig) -> str:
    """The folder of the model if there is one, else its name on the Hub."""
    path = config.model.path
    local = config.base / Path(path).expanduser()
    require(local.is_dir() or path[0] not in "./~", "model", "path", "an existing", "folder", str(local))
    return str(local.resolve()) if local.is_dir() else path  # an adapter remembers it


def _record(config: RunConfig, digests: dict[str, str]) -> dict[str, Any]:
    """What makes a run this run; where its folder lies does not matter."""
    settings = {key: value for key, value in config.raw.items() if key != "output_dir"}
    return json.loads(json.dumps({"config": settings, "data": digests}, default=str))


def check_folder(config: RunConfig, digests: dict[str, str]) -> None:
    """The run folder is new, or that of this run. Raises `InputError` if not."""
    folder = config.output_dir
    if not folder.exists():
        return
    require(folder.is_dir(), str(folder), "output_dir", "type", "folder", "a file")
    stored = folder / "run.json"
    if not stored.exists():
        found = sorted(path.name for path in folder.iterdir())
        require(not found, str(folder), "output_dir", "content", "none, or that of a run", ", ".join(found[:5]))
        return
    before, now = _flatten(read_json(stored)), _flatten(_record(config, digests))
    for key in sorted(before.keys() | now.keys()):
        same = before.get(key) == now.get(key)
        expected = f"{before.get(key)!r} (this run was started with it; use another output_dir)"
        require(same, str(folder), key, "value", expected, repr(now.get(key)))


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _is_done(folder: Path, stage: str) -> bool:
    return (folder / MODEL_FOLDERS[stage]).is_dir()


def _train_stages(config: RunConfig, inputs: _Inputs, wanted: Sequence[str]) -> None:
    """Stage 2 takes over the live weights of stage 1, or those on disk where stage 1 was done before."""
    folder = config.output_dir
    policy: Model | None = None
    for stage in wanted:
        if _is_done(folder, stage):
            continue
        if policy is None:
            set_seed(config.seed)  # a new adapter is random
            policy = load_model(config.model, _start_path(config, inputs, stage), config.lora)
        _train_stage(config, inputs, stage, policy)
        if isinstance(policy, FSDPModule):
            policy = None  # a sharded model cannot be sharded anew: the next stage takes what was saved


def _train_stage(config: RunConfig, inputs: _Inputs, stage: str, policy: Model) -> None:
    """Train `policy` in place, and save it; what it is now is the stage's reference."""
    trainer = _trainer(config, inputs, stage, policy, freeze_reference(policy))
    if trainer.args.should_save:
        print(f"{stage}: {trainer.receipt}")
    trainer.train(resume_from_checkpoint=newest_checkpoint(Path(trainer.args.output_dir)))
    policy.zero_grad()  # gradients have no place in the copy that becomes the next reference
    folder = config.output_dir / MODEL_FOLDERS[stage]
    # Every process takes part in gathering a sharded model, and one writes.
    with replacing_folder(folder) if trainer.args.should_save else contextlib.nullcontext(folder) as unfinished:
        trainer.save_model(str(unfinished))
        if trainer.args.should_save:
            trainer.state.save_to_json(str(unfinished / STATE_FILE))
            if isinstance(trainer, CWDPOTrainer):
                write_json(unfinished / COOLING_FILE, asdict(trainer.cooling))
    trainer.accelerator.wait_for_everyone()


def _start_path(config: RunConfig, inputs: _Inputs, stage: str) -> str:
    after_sft = stage == "dpo" and config.sft is not None
    return str(config.output_dir / MODEL_FOLDERS["sft"]) if after_sft else inputs.model_path


def _trainer(config: RunConfig, inputs: _Inputs, stage: str, policy: Model, reference: nn.Module) -> StageTrainer:
    cooling = config.dpo.fixed_cooling if config.dpo is not None else Cooling()
    probes = Probes(inputs.heldout, inputs.collator, config.probes, config.sampling, cooling, config.seed)
    common = (policy, reference, getattr(config, stage), inputs.rows[stage], inputs.collator, probes)
    origin = _origin(config, inputs)
    if stage == "sft":
        return ConstrainedSFTTrainer(*common, origin=origin)
    return CWDPOTrainer(*common, origin=origin, sampling=config.sampling)


def _results(config: RunConfig, inputs: _Inputs) -> Results:
    """Captions and histories of all that is on disk, whichever process trained it."""
    folder = config.output_dir
    done = [stage for stage in STAGES if _is_done(folder, stage)]
    models = {LABEL_OF_STAGE[stage]: str(folder / MODEL_FOLDERS[stage]) for stage in done}
    if config.sft is None:
        models = {"start": inputs.model_path, **models}
    scenes = distinct_prompts(inputs.heldout)[: config.probes.caption_rows]
    captions = {}
    for label, path in models.items():
        model = load_model(config.model, path, config.lora, trainable=False).to(getattr(config, done[0]).device)
        captions[label] = caption(
            model, inputs.collator, scenes, config.sampling.max_new_tokens, config.probes.batch_size
        )
    histories = {stage: read_json(folder / MODEL_FOLDERS[stage] / STATE_FILE)["log_history"] for stage in done}
    settings = {stage: vars(getattr(config, stage)) for stage in done}
    device = str(getattr(config, done[0]).device)
    return Results(scenes, captions, histories, settings, _origin(config, inputs), config.seed, device)


def _origin(config: RunConfig, inputs: _Inputs) -> Origin:
    return Origin(inputs.model_path, config.raw, inputs.digests)
