"""A run: read and check the inputs, train the stages that are not done yet, write the report.

A stage starts from the model that the stage before it trained, and its reference is a frozen copy of that model.
run_folder.py describes the files of a run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.distributed.fsdp import FSDPModule
from transformers import set_seed

from cwdpo_kernels import Cooling
from cwdpo_trainer.config.loader import PRUNE, RunConfig, prepare
from cwdpo_trainer.config.sections import STAGES
from cwdpo_trainer.config.stage_arguments import DPOArguments
from cwdpo_trainer.config.training_rules import check_batches
from cwdpo_trainer.data.collator import PairCollator
from cwdpo_trainer.data.lengths import LengthMeter, fit_rows
from cwdpo_trainer.data.rows import Row, distinct_prompts, load_rows, split_rows
from cwdpo_trainer.data.screening import bad_rows, without_bad_rows
from cwdpo_trainer.data.sources import open_source
from cwdpo_trainer.errors import InputError, require
from cwdpo_trainer.evaluation.card import Origin
from cwdpo_trainer.evaluation.probes import Probes
from cwdpo_trainer.evaluation.report import Results, print_table, write_report
from cwdpo_trainer.files import read_json, replacing_folder, write_json, writing
from cwdpo_trainer.manifest import seal
from cwdpo_trainer.models.adapters import base_model
from cwdpo_trainer.models.digests import input_digests
from cwdpo_trainer.models.loading import Model, load_model, load_processor, model_path, move
from cwdpo_trainer.models.reference import Reference, freeze_reference
from cwdpo_trainer.negatives.sampling import caption
from cwdpo_trainer.negatives.server import AnswerServer
from cwdpo_trainer.reporter import say
from cwdpo_trainer.run_folder import ANSWERS_FILE, COOLING_FILE, LABEL_OF_STAGE, STATE_FILE, RunFolder
from cwdpo_trainer.stages.base import StageTrainer
from cwdpo_trainer.stages.checkpoints import newest_checkpoint, prune, state_of
from cwdpo_trainer.stages.dpo import CWDPOTrainer
from cwdpo_trainer.stages.sft import ConstrainedSFTTrainer

Result = TypeVar("Result")


def run(config: RunConfig, only: str | None = None) -> dict[str, Any]:
    """Train the stages of `config`, or only the one named `only`. Returns the content of metrics.json.

    An existing run folder is continued: finished stages are not repeated, and an interrupted stage resumes from its
    newest complete checkpoint. Raises `InputError` on wrong input: mistakes in the config and the data are found before
    anything is written to the run folder, others before its first checkpoint.
    """
    stages = [only] if only else config.stages
    args = config.stage(stages[0])
    several = "one process per GPU (accelerate launch), or one GPU (CUDA_VISIBLE_DEVICES)"
    require(args.n_gpu <= 1, "run", "", several, f"one process for {args.n_gpu} GPUs")
    with args.main_process_first(local=False):
        prepare(config)
    current = Run(config, RunInputs.load(config))
    on_main_process(lambda: current.check(stages))
    was_finished = current.folder.is_reported(stages)
    if not was_finished:
        if config.preset is not None:
            say(str(config.preset))
        say(current.describe(stages))
        with current.locked():
            current.train(stages)
            current.write_report()
    metrics = current.folder.metrics()
    print_table(metrics, current.folder, was_finished)
    return metrics


def on_main_process(work: Callable[[], Result]) -> Result:
    """The result of `work` in the main process. If it raises `InputError`, all processes raise it."""
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = work()
        except InputError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@dataclass
class RunInputs:
    """What a run reads, all of it checked.

    `rows` by stage; `datasets` (train, heldout): their rows as read, of any length, usable or not; `model_path` and
    `adapter`: folder or Hub name of the model to start from, and of its adapter; `digests` of the datasets, by name.
    """

    rows: dict[str, list[Row]]
    heldout: list[Row]
    datasets: dict[str, list[Row]]
    model_path: str
    adapter: str | None
    collator: PairCollator
    digests: dict[str, str]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Digests of everything that the run depends on. Reads every image and every file of the model once."""
        return input_digests(self.digests, self.datasets, self.model_path, self.adapter)

    @classmethod
    def load(cls, config: RunConfig) -> RunInputs:
        """Read the datasets and the processor, and fit the rows into data.max_length. Raises `InputError`."""
        sources = {name: open_source(getattr(config.data, name), config.base) for name in ("train", "heldout")}
        skipped = say if config.data.skip_bad_rows else None
        train, heldout = (load_rows(source, skipped) for source in sources.values())
        datasets = {"train": train, "heldout": heldout}
        usable = dict(datasets)
        path = model_path(config)
        collator = PairCollator(load_processor(path))
        for name, source in sources.items():
            errors = on_main_process(partial(bad_rows, datasets[name], collator))
            usable[name] = without_bad_rows(source.name, datasets[name], errors, skipped)
        train, heldout = usable.values()
        if config.data.max_length is not None:
            meter, limit = LengthMeter(collator), config.data.max_length
            fits = [fit_rows(rows, meter, limit, config.data.over_length) for rows in (train, heldout)]
            for source, fit in zip(sources.values(), fits, strict=True):
                say(fit.report(source.name, limit))
            train, heldout = (fit.rows for fit in fits)
        digests = {name: source.digest() for name, source in sources.items()}
        adapter = config.lora.adapter if config.lora is not None else None
        rows = _rows_by_stage(config, train)
        for stage, of_stage in rows.items():
            check_batches(config.stage(stage), stage, len(of_stage))
        return cls(rows, heldout, datasets, path, adapter, collator, digests)


def _rows_by_stage(config: RunConfig, train: list[Row]) -> dict[str, list[Row]]:
    """Two stages share the training rows; a single stage takes all of them."""
    if len(config.stages) == 1:
        return {config.stages[0]: train}
    return dict(zip(STAGES, split_rows(train, config.data.sft_fraction, config.seed), strict=True))


class Run:
    """One run: its config, its inputs and its folder."""

    def __init__(self, config: RunConfig, inputs: RunInputs) -> None:
        self.config = config
        self.inputs = inputs
        self.folder = RunFolder(config.output_dir)

    def check(self, stages: Sequence[str]) -> None:
        """Raise `InputError` if the folder belongs to another run, or if `stages` cannot start from what is there."""
        self.folder.check(self.config, self.inputs.identity)
        needs_sft = list(stages) == ["dpo"] and self.config.sft is not None and not self.folder.is_done("sft")
        require(not needs_sft, str(self.folder), "", "a finished stage sft (run `cwdpo sft` first)", "none")
        server = self.config.sampling.server
        if server is not None and "dpo" in stages and not self.folder.is_reported(stages):
            AnswerServer.open(server, self.inputs.rows["dpo"])  # now rather than after stage 1

    def describe(self, stages: Sequence[str]) -> str:
        """One line: the pairs of each stage and where the results go."""
        training = ", ".join(f"{len(self.inputs.rows[stage])} pairs for {stage}" for stage in stages)
        return f"run in {self.folder}: {training}, {len(self.inputs.heldout)} held-out pairs"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder. The main process holds the lock; if it is refused, all processes raise."""
        PartialState().wait_for_everyone()  # all have checked the folder before one writes to it

        def lock() -> None:
            self.folder.acquire()
            self.folder.check(self.config, self.inputs.identity)  # another run may have started in the meantime

        try:
            on_main_process(lock)
            yield
        finally:
            self.folder.release()

    def train(self, stages: Sequence[str]) -> None:
        """Train those of `stages` that are not done. Stage 2 starts from the weights of stage 1 in memory, or from the
        saved ones if stage 1 was done before."""
        policy: Model | None = None
        for stage in stages:
            if self.folder.is_done(stage):
                say(f"{stage}: finished before, in {self.folder.model(stage)}")
                self._prune(stage)  # a kill may have come before it
                continue
            if policy is None:
                self._verify_start(stage)
                set_seed(self.config.seed)  # a new adapter is random
                base = base_model(self.inputs.model_path)
                policy = load_model(self.config.model, self._start_path(stage), self.config.lora, base=base)
            self._train_stage(stage, policy)
            if isinstance(policy, FSDPModule):
                policy = None  # a sharded model cannot be sharded again: the next stage loads the saved one

    def _train_stage(self, stage: str, policy: Model) -> None:
        """Train `policy` in place and save it. A frozen copy of what it is now is the stage's reference."""
        trainer = self._trainer(stage, policy, freeze_reference(policy))
        if trainer.args.should_save:  # now that the model and the options are known to work
            self.folder.write_record(self.config, self.inputs.identity)
        say(f"{stage}: {trainer.head_info}")
        say(f"{stage}: {trainer.sharing}")
        checkpoint = on_main_process(lambda: newest_checkpoint(trainer.args.folder))
        if checkpoint is not None:
            state = state_of(checkpoint)
            say(f"{stage}: resuming at step {state.global_step} of {state.max_steps}, from {checkpoint}")
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        policy.zero_grad()  # or the next reference would copy the gradients
        self._save(stage, trainer)

    def _save(self, stage: str, trainer: StageTrainer) -> None:
        """Save the stage's model. All processes take part in gathering a sharded model; the main one writes."""
        folder, should_save = self.folder.model(stage), trainer.args.should_save
        with (
            writing(folder, "the model"),
            replacing_folder(folder) if should_save else contextlib.nullcontext(folder) as unfinished,
        ):
            trainer.save_model(str(unfinished))
            if should_save:
                trainer.state.save_to_json(str(unfinished / STATE_FILE))
                write_json(unfinished / ANSWERS_FILE, trainer.probes.answer_counts())
                if isinstance(trainer, CWDPOTrainer) and trainer.cooling is not None:
                    write_json(unfinished / COOLING_FILE, asdict(trainer.cooling))
                seal(unfinished)
        trainer.accelerator.wait_for_everyone()
        self._prune(stage)

    def _prune(self, stage: str) -> None:
        """Delete the checkpoints of a finished stage, unless the config keeps them."""
        if self.config.checkpoints == PRUNE and PartialState().is_main_process:
            prune(self.folder.checkpoints(stage))

    def _starts_after_sft(self, stage: str) -> bool:
        return stage == "dpo" and self.config.sft is not None

    def _start_path(self, stage: str) -> str:
        return str(self.folder.model("sft")) if self._starts_after_sft(stage) else self.inputs.model_path

    def _verify_start(self, stage: str) -> None:
        if self._starts_after_sft(stage):
            on_main_process(lambda: self.folder.verify_model("sft"))

    def _trainer(self, stage: str, policy: Model, reference: Reference) -> StageTrainer:
        config, inputs = self.config, self.inputs
        cooling = config.dpo.fixed_cooling if config.dpo is not None else Cooling()
        probes = Probes(inputs.heldout, inputs.collator, config.probes, config.sampling, cooling, config.seed)
        args, data = config.stage(stage), (inputs.rows[stage], inputs.collator, probes)
        options: dict[str, Any] = {"origin": self._origin(), "prefix_sharing": config.model.prefix_sharing}
        if isinstance(args, DPOArguments):
            return CWDPOTrainer(policy, reference, args, *data, sampling=config.sampling, **options)
        return ConstrainedSFTTrainer(policy, reference, args, *data, **options)

    def write_report(self) -> None:
        """Write the report on all finished stages, including those of earlier processes."""
        stages = self.folder.done_stages()
        args = self.config.stage(stages[0])
        with args.main_process_first(local=False):
            if args.should_save:
                for stage in stages:
                    self.folder.verify_model(stage)
                write_report(self.folder, self._results(stages))

    def _results(self, stages: Sequence[str]) -> Results:
        """Captions of the model before training and of the saved models, and the latter's log histories."""
        config, inputs = self.config, self.inputs
        device = config.stage(stages[0]).device
        models = {"start": inputs.model_path}
        models |= {LABEL_OF_STAGE[stage]: str(self.folder.model(stage)) for stage in stages}
        prompts = distinct_prompts(inputs.heldout)[: config.probes.caption_rows]
        captions = {}
        for label, path in models.items():
            base = base_model(inputs.model_path)
            model = load_model(config.model, path, config.lora, trainable=False, base=base)
            move(model, device)
            captions[label] = caption(
                model, inputs.collator, prompts, config.sampling.max_new_tokens, config.probes.batch_size
            )
        histories = {stage: read_json(self.folder.model(stage) / STATE_FILE)["log_history"] for stage in stages}
        settings = {stage: vars(config.stage(stage)) for stage in stages}
        answers = {stage: self._answer_counts(stage) for stage in stages}
        return Results(prompts, captions, histories, settings, answers, self._origin(), config.seed, str(device))

    def _answer_counts(self, stage: str) -> dict[str, int]:
        path = self.folder.model(stage) / ANSWERS_FILE
        if path.is_file():  # a damaged folder has been refused
            return read_json(path)
        say(f"{stage}: {path} is missing, as in runs of earlier versions: the report has no n, and no diagnosis")
        return {}

    def _origin(self) -> Origin:
        inputs = self.inputs
        return Origin(inputs.model_path, self.config.raw, inputs.digests, inputs.collator.is_text_only)
