"""A run: check everything, train the stages that are not done yet, measure, write the results."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import set_seed

from cwdpo_kernels import Cooling
from cwdpo_trainer.config.arguments import StageArguments
from cwdpo_trainer.config.loader import STAGES, RunConfig, prepare
from cwdpo_trainer.data.collator import PairCollator
from cwdpo_trainer.data.lengths import LengthMeter, fit_rows
from cwdpo_trainer.data.rows import Row, distinct_prompts, load_rows, split_rows
from cwdpo_trainer.data.sources import open_source
from cwdpo_trainer.errors import require
from cwdpo_trainer.evaluation.card import Origin
from cwdpo_trainer.evaluation.probes import Probes
from cwdpo_trainer.evaluation.report import Results, is_reported, print_table, write_report
from cwdpo_trainer.evaluation.summary import LABEL_OF_STAGE
from cwdpo_trainer.files import read_json, replacing_folder, write_json
from cwdpo_trainer.models.loading import Model, freeze_reference, load_model, load_processor, model_path
from cwdpo_trainer.negatives.sampling import caption
from cwdpo_trainer.negatives.server import AnswerServer
from cwdpo_trainer.reporter import say
from cwdpo_trainer.run_folder import COOLING_FILE, MODEL_FOLDERS, RECORD_FILE, STATE_FILE, check_folder, is_done, record
from cwdpo_trainer.stages.base import StageTrainer
from cwdpo_trainer.stages.checkpoints import newest_checkpoint
from cwdpo_trainer.stages.dpo import CWDPOTrainer
from cwdpo_trainer.stages.sft import ConstrainedSFTTrainer


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
    require(wanted[0] in stages, "config", "", f"a section {wanted[0]}", ", ".join(stages))
    folder = config.output_dir
    args: StageArguments = getattr(config, wanted[0])
    several = "one process per GPU (accelerate launch), or one GPU (CUDA_VISIBLE_DEVICES)"
    require(args.n_gpu <= 1, "run", "", several, f"one process for {args.n_gpu} GPUs")
    with args.main_process_first(local=False):
        prepare(config)
    inputs = _load_inputs(config, stages)
    check_folder(config, inputs.digests)
    needs_sft = wanted == ["dpo"] and "sft" in stages and not is_done(folder, "sft")
    require(not needs_sft, str(folder), "", "a finished stage sft (run `cwdpo sft` first)", "none")
    finished = is_reported(folder, wanted)
    if not finished:
        if config.sampling.server is not None and "dpo" in wanted:
            AnswerServer.open(config.sampling.server, inputs.rows["dpo"])  # rather than after stage 1
        PartialState().wait_for_everyone()  # nobody looks at the folder while it is written to
        if args.should_save:
            write_json(folder / RECORD_FILE, record(config, inputs.digests))
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
    train, heldout = (load_rows(source, say if config.data.skip_bad_rows else None) for source in sources.values())
    path = model_path(config)
    collator = PairCollator(load_processor(path))
    if config.data.max_length is not None:
        meter, limit = LengthMeter(collator), config.data.max_length
        fits = [fit_rows(rows, meter, limit, config.data.over_length) for rows in (train, heldout)]
        for source, fit in zip(sources.values(), fits, strict=True):
            say(fit.report(source.name, limit))
        train, heldout = (fit.rows for fit in fits)
    if len(stages) == 2:
        shares = split_rows(train, config.data.sft_fraction, config.seed)
        rows = dict(zip(STAGES, shares, strict=True))
    else:
        rows = {stages[0]: train}
    digests = {name: source.digest() for name, source in sources.items()}
    return _Inputs(rows, heldout, path, collator, digests)


def _train_stages(config: RunConfig, inputs: _Inputs, wanted: Sequence[str]) -> None:
    """Stage 2 takes over the live weights of stage 1, or those on disk where stage 1 was done before."""
    folder = config.output_dir
    policy: Model | None = None
    for stage in wanted:
        if is_done(folder, stage):
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
    say(f"{stage}: {trainer.head_info}")
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
    done = [stage for stage in STAGES if is_done(folder, stage)]
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
