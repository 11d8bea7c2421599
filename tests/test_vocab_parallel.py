"""Heads split over processes by vocabulary: 2 and 3 processes against one. The checks are in the worker."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cwdpo_kernels as ck
from cwdpo_kernels._vocab_parallel import ELSEWHERE, IGNORED, labels_in_part

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_agree_with_one(processes, tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "vocab_parallel_worker.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    outputs = [tmp_path / f"rank{rank}.txt" for rank in range(processes)]
    workers = []
    for rank, output in enumerate(outputs):
        arguments = [*command, str(rank), str(processes), str(tmp_path / "store")]
        with output.open("w") as file:
            workers.append(subprocess.Popen(arguments, env=environment, stdout=file, stderr=subprocess.STDOUT))
    try:
        statuses = [worker.wait(timeout=240) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert statuses == [0] * processes, "\n".join(output.read_text() for output in outputs)


def test_a_part_of_one_process_is_the_whole_head(tmp_path):
    """A group of one process, in this process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        hidden, weight, labels = torch.randn(5, 8), torch.randn(19, 8), torch.tensor([3, -100, 0, 18, 7])
        part = ck.Head(weight, shard=ck.VocabShard(None, 0, 19))
        for actual, expected in zip(
            ck.token_stats(hidden, part, labels), ck.token_stats(hidden, weight, labels), strict=True
        ):
            torch.testing.assert_close(actual, expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ignore_index", [-100, -1, -3, 1, 5])
def test_labels_of_other_parts_are_not_ignored(ignore_index):
    """Counted from the part's start, any label may look like `ignore_index`, inside the part and outside."""
    labels = torch.tensor([ignore_index, *(value for value in range(12) if value != ignore_index)])
    local = labels_in_part(labels, 4, 6, ignore_index)
    expected = [IGNORED if x == ignore_index else x - 4 if 4 <= x < 10 else ELSEWHERE for x in labels.tolist()]
    assert local.tolist() == expected


@pytest.mark.parametrize(("start", "size"), [(-1, 5), (0, 0), (1.0, 5), (True, 5)])
def test_options_of_a_part_are_checked(start, size):
    with pytest.raises(ValueError, match=r"VocabShard: expected (start|size) to have value an integer >= [01]"):
        ck.VocabShard(None, start, size)
