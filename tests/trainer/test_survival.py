"""A run that is killed, damaged or out of disk space ends with the weights of an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cwdpo_trainer import cli

sys.path.insert(0, str(Path(__file__).parent))
from forked import Forks

pytestmark = pytest.mark.slow
KILLS = 20
STAGE = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "eval_steps": 2, "logging_steps": 1,
         "save_steps": 1, "disable_tqdm": True}  # fmt: skip


class Server:
    """Runs `cwdpo run CONFIG output_dir=FOLDER` in a process each."""

    def __init__(self, forks: Forks, config: Path) -> None:
        self.forks, self.config = forks, config
        self.errors = config.with_name(f"stderr-{time.monotonic_ns()}.txt")

    def run(self, folder: Path, kill_after: float | None = None, kill_at: Path | None = None) -> int:
        """The exit status. `kill_after` seconds, or once the file `kill_at` exists, the process is killed."""
        process = self._start(cli.__file__, "run", str(self.config), f"output_dir={folder}")
        while kill_at is not None and not kill_at.exists():
            time.sleep(0.001)
        if kill_at is not None:
            os.kill(process, signal.SIGKILL)
        return self.forks.wait(process, 300 if kill_after is None else kill_after)

    def shell(self, *command: str) -> None:
        code = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
        assert self.forks.wait(self._start("-c", code, *command)) == 0, self.errors.read_text()

    def _start(self, *command: str) -> int:
        return self.forks.start(*command, stdout=Path(os.devnull), stderr=self.errors)


@pytest.fixture(scope="module")
def config(task, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("survival") / "config.yaml"
    settings = {
        "output_dir": "unused",
        "checkpoints": "keep",  # to be compared
        "model": {"path": str(task / "model")},
        "data": {"train": str(task / "train.jsonl"), "heldout": str(task / "heldout.jsonl")},
        "sft": STAGE,
        "dpo": {**STAGE, "onpolicy_fraction": 0.5, "refresh_steps": 2, "logp_floor": "auto", "tau": "auto",
                "auto_rows": 4, "curriculum": "hardest_first"},
        "probes": {"rows": 6, "batch_size": 8, "caption_rows": 6},
        "sampling": {"max_new_tokens": 6},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def server(forks, config) -> Server:
    return Server(forks, config)


@pytest.fixture(scope="module")
def uninterrupted(server, config) -> tuple[Path, float]:
    """The folder of an uninterrupted run, and the seconds that it took."""
    folder = config.with_name("uninterrupted")
    start = time.monotonic()
    assert server.run(folder) == 0, server.errors.read_text()
    return folder, time.monotonic() - start


def files(folder: Path) -> dict[str, bytes]:
    """Everything that must not depend on interruptions, by name."""
    names = ["sft/model.safetensors", "cwdpo/model.safetensors", "cwdpo/cooling.json", "probes.csv",
             "predictions.jsonl", "checkpoints/dpo/negatives_0.jsonl"]  # fmt: skip
    for stage in ("sft", "dpo"):
        names += [f"checkpoints/{stage}/checkpoint-6/{name}" for name in ("model.safetensors", "optimizer.pt")]
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics.pop("timing")
    return {name: (folder / name).read_bytes() for name in names} | {"metrics": json.dumps(metrics).encode()}


def assert_same(folder: Path, uninterrupted: Path) -> None:
    expected, found = files(uninterrupted), files(folder)
    assert [name for name in expected if found[name] != expected[name]] == []
    assert not list(folder.glob(".*"))


def test_a_run_killed_at_random_moments_loses_nothing(server, uninterrupted, config):
    whole, seconds = uninterrupted
    rng = random.Random(17)
    kills, runs = 0, 0
    while kills < KILLS:
        folder, status = config.with_name(f"killed-{runs}"), -signal.SIGKILL
        while status == -signal.SIGKILL:
            status = server.run(folder, kill_after=rng.uniform(0, seconds) if kills < KILLS else None)
            kills += status == -signal.SIGKILL
        assert status == 0, server.errors.read_text()
        assert_same(folder, whole)
        runs += 1
    print(f"{kills} kills in {runs} runs of {seconds:.1f} s, all with the same files")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def stray_copy(newest: Path) -> None:
    shutil.copytree(newest, newest.with_name("checkpoint-9.bak"))
    os.utime(newest.with_name("checkpoint-2"), (4e9, 4e9))


# By name, what to do to the newest checkpoint.
DAMAGE = {
    "weights with a flipped bit": lambda newest: flip(newest / "model.safetensors"),
    "no optimizer": lambda newest: (newest / "optimizer.pt").unlink(),
    "half a scheduler": lambda newest: cut(newest / "scheduler.pt"),
    "an empty random state": lambda newest: os.truncate(newest / "rng_state.pth", 0),
    "half a trainer state": lambda newest: cut(newest / "trainer_state.json"),
    "a changed pool": lambda newest: (newest / "onpolicy_pool_0.json").write_text("{}"),
    "another cooling": lambda newest: flip(newest / "cooling.json"),
    "an empty COMPLETE": lambda newest: os.truncate(newest / "COMPLETE", 0),
    "a stray folder and a wrong clock": stray_copy,
    "a damaged reference cache": lambda newest: flip(next(newest.parents[2].glob("reference_cache/*/*.jsonl"))),
}


@pytest.fixture(scope="module")
def killed(server, config) -> Path:
    """The folder of a run that was killed in stage 2, with two whole checkpoints."""
    folder = config.with_name("killed")
    assert server.run(folder, kill_at=folder / "checkpoints/dpo/checkpoint-4/COMPLETE") == -signal.SIGKILL
    return folder


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_does_not_change_the_result(kind, server, killed, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    stage = folder / "checkpoints/dpo"
    DAMAGE[kind](max(stage.glob("checkpoint-?/COMPLETE")).parent)
    assert server.run(folder) == 0, server.errors.read_text()
    shutil.rmtree(stage / "checkpoint-9.bak", ignore_errors=True)
    assert_same(folder, uninterrupted[0])


@pytest.fixture(scope="module")
def small_disk(config) -> Iterator[Server]:
    """A server that may mount file systems, in a user namespace of its own."""
    namespace = ("unshare", "--user", "--map-root-user", "--mount")
    if shutil.which("unshare") is None or subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces")
    with Forks(namespace) as forks:
        yield Server(forks, config)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.85])
def test_a_full_disk_loses_nothing(share, small_disk, uninterrupted, config, tmp_path):
    """The disk has room for `share` of what an uninterrupted run leaves, and then for all."""
    whole = uninterrupted[0]
    size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    folder, copy = tmp_path / "run", config.with_name(f"copy-{share}")  # images have the same relative names in both
    small_disk.shell("mount", "-t", "tmpfs", "-o", f"size={int(share * size)}", "tmpfs", str(tmp_path))
    assert small_disk.run(folder) == 2, small_disk.errors.read_text()
    errors = small_disk.errors.read_text()
    lines = [line for line in errors.splitlines() if "cwdpo: " in line]
    assert len(lines) == 1, errors
    assert "Traceback" not in errors
    assert str(folder) in lines[0]
    small_disk.shell("mount", "-o", "remount,size=100%", str(tmp_path))
    assert small_disk.run(folder) == 0, small_disk.errors.read_text()
    small_disk.shell("cp", "-r", str(folder), str(copy))
    assert_same(copy, whole)
