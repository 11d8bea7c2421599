"""What a stage shows and keeps while it trains."""

from __future__ import annotations

import json

from cwdpo_kernels import Cooling
from cwdpo_trainer.config.arguments import ProbeArguments, SamplingArguments
from cwdpo_trainer.config.stage_arguments import SFTArguments
from cwdpo_trainer.evaluation.probes import Probes
from cwdpo_trainer.models.reference import freeze_reference
from cwdpo_trainer.stages.sft import ConstrainedSFTTrainer


def trainer(model, collator, rows, folder, steps):
    args = SFTArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=1, eval_strategy="no",
        eval_on_start=False, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    probes = Probes(rows, collator, ProbeArguments(rows=2), SamplingArguments(max_new_tokens=3), Cooling(), seed=0)
    return ConstrainedSFTTrainer(model, freeze_reference(model), args, rows[:16], collator, probes)


def test_training_time_survives_a_kill(model, collator, rows, tmp_path):
    def seconds(resumed):
        (value,) = [entry["train_runtime"] for entry in resumed.state.log_history if "train_runtime" in entry][-1:]
        return value

    trainer(model, collator, rows, tmp_path, 2).train()
    for step, steps in ((1, 2), (2, 2)):  # killed within training, and after its last checkpoint
        state = tmp_path / f"checkpoint-{step}/trainer_state.json"
        content = json.loads(state.read_text())
        clock = content["stateful_callbacks"]["TrainingClock"]["attributes"]
        assert clock["before"] > 0
        clock["before"] = 1000.0 * step
        state.write_text(json.dumps(content))
        resumed = trainer(model, collator, rows, tmp_path, steps)
        resumed.train(resume_from_checkpoint=str(state.parent))
        assert 1000 * step <= seconds(resumed) < 1000 * step + 100
