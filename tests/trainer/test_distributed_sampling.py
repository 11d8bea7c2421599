"""The processes of a sharded model sample their negatives together."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import run_worker


def test_processes_of_a_sharded_model_sample_together(forks, settings, write_config, tmp_path):
    """At a step, processes need different numbers of answers, or none, but all must take part in each forward."""
    del settings["sft"]
    settings["dpo"].update(
        max_steps=8, eval_steps=8, use_cpu=True, per_device_train_batch_size=1, onpolicy_fraction=0.5,
        onpolicy_staleness=0.0, logp_floor="auto", tau="auto",
    )  # fmt: skip
    forks.run_connected(run_worker.__file__, "fsdp", str(write_config(settings)), folder=tmp_path)
    needed = []
    for rank in range(2):
        path = Path(settings["output_dir"]) / "checkpoints" / "dpo" / f"negatives_{rank}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(8))
        needed.append([line["origin"] == "onpolicy" for line in lines])
    assert any(needed[0])
    assert any(needed[1])
    assert needed[0] != needed[1]
