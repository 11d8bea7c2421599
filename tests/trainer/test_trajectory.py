"""Both stages end to end: the loss and metrics of each step, and the probes, are those pinned in trajectory.json.

Rounding changes them by about 1e-6, so the test passes on any CPU and backend. A change of what is computed (a loss, a
mask, the order of rows, a schedule, a sample) changes them by more than the tolerance. If a change is intended, write
the file again and look at the differences before you commit it:

    python -m pytest tests/trainer/test_trajectory.py --write-trajectory
"""

from __future__ import annotations

import json
import math
import platform
from importlib.metadata import version
from pathlib import Path

from cwdpo_trainer.cli import main

PINNED = Path(__file__).with_name("trajectory.json")
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "pillow")
STAGE = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1, "eval_steps": 4,
    "save_strategy": "no", "weight_decay": 0.1, "warmup_steps": 2, "lr_scheduler_type": "cosine", "disable_tqdm": True,
}  # fmt: skip
CONFIG = {
    "seed": 3,
    "data": {"sft_fraction": 0.5},
    "sft": {**STAGE, "max_steps": 8, "learning_rate": 3e-3, "negatives_weight": 0.5, "nll_floor": 4.5},
    "dpo": {
        **STAGE, "max_steps": 12, "learning_rate": 1e-3, "beta": 0.3, "logp_floor": "auto", "tau": "auto",
        "auto_rows": 12, "drop_below": -8.0, "onpolicy_fraction": [[0, 0.2], [1, 0.8]], "onpolicy_staleness": 0.3,
        "refresh_steps": 6,
    },
    "probes": {"rows": 12, "batch_size": 8, "caption_rows": 4},
    "sampling": {"max_new_tokens": 6},
}  # fmt: skip
# Left out: times, metrics that jump when rounding changes (bins, signs), and totals of a run.
LEFT_OUT = ("runtime", "per_second", "ece", "bin", "accuracy", "epoch", "flos", "train_loss")


def trajectory(folder: Path) -> dict[str, list[dict[str, float]]]:
    """The log entries of both stages."""
    stages = {}
    for stage, name in (("sft", "sft"), ("dpo", "cwdpo")):
        history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
        kept = [
            {key: value for key, value in entry.items() if not any(word in key for word in LEFT_OUT)}
            for entry in history
        ]
        stages[stage] = [entry for entry in kept if entry.keys() != {"step"}]
    return stages


def environment() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}


def differences(expected: dict, found: dict) -> list[str]:
    """A line for each value that differs by more than 1e-4 relative and 1e-6 absolute."""
    lines = []
    for stage, entries in expected.items():
        if len(entries) != len(found[stage]):
            lines.append(f"{stage}: expected {len(entries)} log entries, got {len(found[stage])}")
        for before, now in zip(entries, found[stage], strict=False):
            for key in sorted(before.keys() | now.keys()):
                old, new = before.get(key, math.nan), now.get(key, math.nan)
                if not math.isclose(old, new, rel_tol=1e-4, abs_tol=1e-6):
                    lines.append(f"{stage}, step {before['step']}: expected {key} {old}, got {new}")
    return lines


def test_the_trajectory_is_unchanged(settings, write_config, request):
    config = {**CONFIG, "data": {**settings["data"], **CONFIG["data"]}}
    main(["run", str(write_config({**settings, **config}))])
    found = trajectory(Path(settings["output_dir"]))
    if request.config.getoption("--write-trajectory", default=False):
        pinned = {"config": CONFIG, "environment": environment(), **found}
        PINNED.write_text(json.dumps(pinned, indent=1) + "\n")
    pinned = json.loads(PINNED.read_text())
    assert pinned["config"] == CONFIG, "trajectory.json was written with another config: write it again"
    lines = differences({stage: pinned[stage] for stage in found}, found)
    versions = f"pinned with {pinned['environment']}, now {environment()}"
    assert not lines, "\n".join([f"{len(lines)} values differ ({versions}):", *lines[:10]])


def test_the_pinned_trajectory_covers_every_mechanism():
    """Every mechanism acts: hinge and filter switch on and off, weights vary, answers are drawn and redrawn."""
    pinned = json.loads(PINNED.read_text())
    values = {
        name: [entry[name] for entry in pinned[stage] if name in entry]
        for stage, names in {
            "sft": ["penalty"],
            "dpo": ["kept", "cooling_weight", "onpolicy", "onpolicy_staleness", "logp_floor", "tau"],
        }.items()
        for name in names
    }
    assert min(values["penalty"]) == 0 < max(values["penalty"])
    assert 0 < min(values["kept"]) < max(values["kept"])
    assert 0.1 < min(values["cooling_weight"]) < max(values["cooling_weight"]) - 0.05 < 0.9
    assert 0 == min(values["onpolicy"]) < max(values["onpolicy"])
    assert min(values["onpolicy_staleness"]) < 0.3 < max(values["onpolicy_staleness"])
    assert len(values["logp_floor"]) == len(values["tau"]) == 1
    for stage, steps in (("sft", 8), ("dpo", 12)):
        assert [entry["step"] for entry in pinned[stage] if "loss" in entry] == list(range(1, steps + 1))
