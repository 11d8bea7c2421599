"""Checkpoints: ordered by step, complete with a list of their files, and whole or passed over."""

from __future__ import annotations

import json
import os
import time

import pytest

from cwdpo_trainer import manifest
from cwdpo_trainer.errors import InputError
from cwdpo_trainer.manifest import COMPLETE, seal, verify
from cwdpo_trainer.stages.checkpoints import keep_newest, newest_checkpoint


@pytest.fixture
def save(tmp_path):
    """Makes a checkpoint with three files, complete unless told otherwise."""

    def save(step, complete=True):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "shards").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(range(200)))
        (folder / "optimizer.pt").write_bytes(b"moments" * step)
        (folder / "shards" / "0.bin").write_bytes(b"\0" * 10)
        if complete:
            seal(folder)
        return folder

    return save


def names(folder):
    return sorted((path.name for path in folder.glob("checkpoint-*")), key=lambda name: int(name[11:]))


def test_the_step_orders_checkpoints_and_not_the_clock(save, tmp_path):
    tomorrow = time.time() + 86400
    for step in (2, 4, 6, 8, 10):
        folder = save(step)
        if step < 10:
            for path in (folder, *folder.iterdir()):
                os.utime(path, (tomorrow - step, tomorrow - step))
        keep_newest(tmp_path, step, None, 2)
        assert newest_checkpoint(tmp_path) == folder
    assert names(tmp_path) == ["checkpoint-8", "checkpoint-10"]


def test_the_best_checkpoint_counts_toward_the_limit(save, tmp_path):
    for step in range(1, 7):
        save(step)
    keep_newest(tmp_path, 6, tmp_path / "checkpoint-2", 3)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-5", "checkpoint-6"]
    keep_newest(tmp_path, 6, None, None)
    assert len(names(tmp_path)) == 3


def test_incomplete_checkpoints_and_those_of_later_steps_do_not_count(save, tmp_path):
    """Training went back from a damaged checkpoint-9 to checkpoint-2 and has just saved checkpoint-4."""
    for step in (1, 2, 4):
        save(step)
    for step in (3, 6):
        save(step, complete=False)
    save(9)
    keep_newest(tmp_path, 4, None, 2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_other_names_are_left_alone(save, tmp_path):
    save(4)
    for name in ("checkpoint-4.bak", "checkpoint-", "checkpoint-x", "checkpoint-07", "checkpoint-9-old", "notes"):
        save(1).rename(tmp_path / name)
    (tmp_path / "checkpoint-11").touch()  # a file
    keep_newest(tmp_path, 4, None, 2)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert len(list(tmp_path.iterdir())) == 8


def damage_flip(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": (damage_flip, "model.safetensors: expected the content that was saved"),
    "a cut file": (lambda folder: os.truncate(folder / "optimizer.pt", 5), "optimizer.pt: expected the 28 bytes"),
    "a missing file": (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt: expected the 28 bytes that"),
    "a missing file in a folder": (lambda folder: (folder / "shards" / "0.bin").unlink(), "0.bin: expected the 10"),
    "an empty list": (lambda folder: (folder / COMPLETE).write_text(""), "COMPLETE: expected valid JSON"),
    "a list of another kind": (lambda folder: (folder / COMPLETE).write_text("[1]"), "COMPLETE: expected a JSON obj"),
    "a list without sizes": (lambda folder: (folder / COMPLETE).write_text('{"files": {"model.safetensors": 3}}'),
                             "COMPLETE: files: expected a size and a SHA-256"),
    "bytes": (lambda folder: (folder / COMPLETE).write_bytes(b"\xff\xfe\x00"), "COMPLETE: expected UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(kind, save, tmp_path, capsys):
    damage, message = DAMAGE[kind]
    save(2)
    damage(save(4))
    with pytest.raises(InputError, match=message):
        verify(tmp_path / "checkpoint-4")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert f"damaged checkpoint: {tmp_path / 'checkpoint-4'}/" in capsys.readouterr().out


def test_without_a_whole_checkpoint_the_stage_starts_again_and_says_so(save, tmp_path, capsys):
    damage_flip(save(2))
    assert newest_checkpoint(tmp_path) is None
    assert "no whole checkpoint is left, so the stage starts again" in capsys.readouterr().out
    assert newest_checkpoint(tmp_path / "empty") is None
    assert capsys.readouterr().out == ""


def test_the_list_is_written_when_all_files_are_on_the_disk(tmp_path, monkeypatch):
    """A power failure then leaves no complete checkpoint with empty files."""
    events = []
    flush, write_json = manifest.flush, manifest.write_json
    monkeypatch.setattr(manifest, "flush", lambda path: (events.append(path.name), flush(path)))
    monkeypatch.setattr(manifest, "write_json", lambda *args: (events.append(COMPLETE), write_json(*args)))
    folder = tmp_path / "checkpoint-1"
    (folder / "shards").mkdir(parents=True)
    (folder / "a.pt").write_bytes(b"a")
    (folder / "shards" / "0.bin").write_bytes(b"b")
    (folder / "README.md").write_text("the card is written later")
    seal(folder)
    assert sorted(events[:-1]) == ["0.bin", "a.pt", "checkpoint-1", "shards"]
    assert events[-1] == COMPLETE
    assert set(json.loads((folder / COMPLETE).read_text())["files"]) == {"a.pt", "shards/0.bin"}
    (folder / "README.md").write_text("another")
    verify(folder)
