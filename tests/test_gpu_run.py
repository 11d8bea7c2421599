"""`benchmarks.gpu` with a CPU in place of the GPU: cut at any moment it keeps its rows, and crashes do not stop it."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from benchmarks import gpu, gpu_child, gpu_file, gpu_plan, gpu_pytest, gpu_report, gpu_run, models, peers, tune

sys.path.insert(0, str(Path(__file__).parent))
from killed_runs import kill_and_resume, rows, running

ROOT = Path(__file__).parents[1]
TINY = models.Shape("tiny", tokens=40, vocab=300, dim=64)
PARTS = ("--parts", "values", "ours", "limits", "logits", "other")  # one process


def check_finished(data, parts):
    peers = {"eager, full logits": None, "crashing": None, "absent": "no_such_module"}
    items = gpu_plan.plan([TINY], parts, peers, ["24 : 8"])
    assert sorted(data["done"]) == sorted(item.name for item in items)
    timed = {item.op for item in items if item.timed}
    assert timed <= {row["op"] for row in data["measurements"]}
    assert all(row["of_limit"] > 0 for row in data["measurements"] if "limits" in parts)
    assert len({(row["shape"], row["op"]) for row in data["measurements"]}) == len(data["measurements"])


def test_killed_at_random_moments_it_keeps_every_row_and_goes_on(tmp_path):
    data = kill_and_resume(tmp_path, 3, 5, *PARTS)
    check_finished(data, PARTS[1:])
    assert data["failed"] == {}
    assert data["environment"]["simulated"] is True
    assert data["environment"]["device"] == "simulated by simulated_gpu.py, no GPU"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_ten_random_moments(tmp_path, seed):
    data = kill_and_resume(tmp_path, 10, seed)
    check_finished(data, gpu_plan.PARTS)
    assert data["tests"] == {"compile": "simulated", "run": "simulated", "sanitizer": "simulated"}


def test_a_run_finishes_although_a_peer_crashes_its_process(tmp_path):
    with running(tmp_path, "--parts", "peers", "--commit", "abc") as process:
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    data, measured = rows(tmp_path)
    check_finished(data, ("peers",))
    assert {op for _, _, op in measured} == {"eager, full logits, frozen", "eager, full logits, trainable"}
    assert data["failed"]["tiny, crashing, frozen"] == "the process ended with SIGSEGV"
    assert data["failed"]["tiny, absent, trainable"] == "not installed"
    assert data["environment"]["commit"] == "abc"


def test_a_process_that_dies_is_noticed_although_one_that_it_forked_lives(tmp_path, monkeypatch):
    """The latter holds the pipe open: without a look at the process, the run would wait for the item's limit."""
    code = "import os, time; os.fork() or time.sleep(600); os.abort()"
    command = [sys.executable, "-c", code]
    popen = subprocess.Popen
    monkeypatch.setattr(gpu_child.subprocess, "Popen", lambda _, **options: popen(command, **options))
    with (tmp_path / "log.txt").open("w") as log:
        child = gpu_child.Child([], log)
        try:
            with pytest.raises(gpu_child.Ended, match="the process ended with SIGABRT"):
                next(child.receive(60))
        finally:
            child.close()


def test_the_tuner_compiles_times_and_chooses(tmp_path):
    pytest.importorskip("triton")
    with running(tmp_path, "--dtype", "float32", module="tune", TRITON_INTERPRET="1") as process:
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    data = json.loads((tmp_path / "tune.json").read_text())
    assert data["failed"] == {}
    assert [row["problem"] for row in data["candidates"]] == ["", ""]
    assert {(row["kernel"], row["dim"]) for row in data["tuned"]} == {(name, 64) for name in tune.KERNELS}
    assert len(data["tuned"]) == 4
    assert output.count('("interpreter", "ieee", 64): TileConfig(block_n=32, block_v=') == 3
    with running(tmp_path, "--dtype", "float32", "--resume", module="tune") as process:  # nothing is left to do
        again, _ = process.communicate(timeout=600)
    assert again == output[output.index("simulated by") :]


def test_a_simulated_file_is_not_reported(tmp_path):
    environment = {"device": "simulated", "simulated": True, "commit": "", "versions": {}}
    (tmp_path / "gpu_x.json").write_text(json.dumps({"environment": environment}))
    with pytest.raises(ValueError, match=r"gpu_x\.json: expected results of a GPU, got a simulation"):
        gpu_report.sections(tmp_path)


def test_a_run_that_was_cut_is_reported(tmp_path):
    found = json.loads((gpu_report.results.FOLDER / "gpu_h100.json").read_text())
    whole = gpu_report.of_device(found)
    del found["limits"]["SmolVLM-256M"]
    found["measurements"] = [x for x in found["measurements"] if x["shape"] == "SmolVLM-256M" and x["op"] == "frozen"]
    found["failed"] = {"tests": "left out: the time budget is spent"}
    (text,) = (text for text in gpu_report.of_device(found) if text.startswith("**SmolVLM"))
    assert "1.32 ms, 0.27 GiB" in text
    assert "matrix products" not in text
    assert "Other ops" not in text
    assert gpu_report.of_device(found)[-1] == "Did not run: tests (`left out: the time budget is spent`)."
    assert any("matrix products alone" in text for text in whole)


class FakeChild:
    """Answers requests at once: `answers` maps an item to its messages, or to the exception that ends it."""

    answers: ClassVar[dict] = {}
    starts: ClassVar[list] = []
    environment: ClassVar[dict] = {
        "device": "d", "torch": "2", "triton": "3", "python": "3", "commit": "c", "versions": {},
    }  # fmt: skip

    def __init__(self, arguments, log, path=None):
        self.starts.append((arguments[1], path))
        self.name = None

    def send(self, request):
        self.name = request["name"]

    def receive(self, seconds):
        if self.name is None:
            if isinstance(error := self.answers.get("start"), Exception):
                raise error
            yield {"environment": self.environment, "cannot_run": {}}
        answer = self.answers.get(self.name, [{"done": self.name}])
        if isinstance(answer, Exception):
            raise answer
        yield from answer

    def close(self):
        pass


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A function that runs items against answers and returns the data and the processes that were started."""
    monkeypatch.setattr(gpu_run, "Child", FakeChild)

    def run(items, answers, seconds=60.0, resume=False, **environment):
        monkeypatch.setattr(FakeChild, "answers", answers)
        monkeypatch.setattr(FakeChild, "starts", [])
        monkeypatch.setattr(FakeChild, "environment", FakeChild.environment | environment)
        report = gpu_file.open_report(tmp_path / "gpu.json", resume)
        work = gpu_run.Run(report, seconds, None, [], tmp_path / "peers", gpu_plan.LIMITS)
        for item in items:
            work.do(item)
        saved = json.loads((tmp_path / "gpu.json").read_text())
        assert saved == json.loads(json.dumps(report.data))
        return saved, [name for name, _ in FakeChild.starts]

    return run


def test_a_failing_item_is_a_row_and_a_new_process_goes_on_after_a_crash(fake):
    items = gpu_plan.plan([TINY], ("ours",))
    names = [item.name for item in items]
    data, starts = fake(items, {
        names[0]: [{"failed": names[0], "reason": "RuntimeError: no", "fatal": False}],
        names[1]: gpu_child.Ended("the process ended with SIGSEGV"), names[2]: gpu_child.TooLong(),
        names[3]: [{"failed": names[3], "reason": "an illegal memory access", "fatal": True}],
    })  # fmt: skip
    assert list(data["failed"].values()) == [
        "RuntimeError: no", "the process ended with SIGSEGV", "took longer than its limit, 120 s",
        "an illegal memory access",
    ]  # fmt: skip
    assert data["done"] == names
    assert starts == ["ours"] * 4


def test_a_peer_that_keeps_crashing_is_given_up(fake):
    items = gpu_plan.plan([TINY, models.Shape("other", 8, 9, 8)], ("peers",), {"a peer": None})
    data, starts = fake(items, {item.name: gpu_child.Ended("crash") for item in items})
    assert list(data["failed"].values()) == ["crash", "crash", "given up: crash", "given up: crash"]
    assert starts == ["a peer"] * 2


def test_a_process_that_does_not_start_is_not_tried_again(fake):
    items = gpu_plan.plan([TINY], ("peers",), {"a peer": None})
    data, starts = fake(items, {"start": gpu_child.Ended("the process ended with status 1")})
    assert set(data["failed"].values()) == {"its process did not start: the process ended with status 1"}
    assert len(starts) == 1


def test_ours_is_not_timed_if_its_values_are_wrong(fake):
    items = gpu_plan.plan([TINY], ("values", "ours", "limits", "logits"))
    wrong = "values, bfloat16"
    data, _ = fake(items, {wrong: [{"failed": wrong, "reason": "AssertionError: logp", "fatal": False}]})
    skipped = {name for name, reason in data["failed"].items() if reason.startswith("not timed: values, bfloat16: Ass")}
    assert skipped == {item.name for item in items if item.timed}
    assert "tiny, limits" not in data["failed"]


def test_nothing_new_starts_after_the_budget_and_resume_goes_on(fake):
    items = gpu_plan.plan([TINY], ("ours",))
    data, starts = fake(items, {}, seconds=1.0)
    assert starts == []
    assert set(data["failed"].values()) == {"left out: the time budget is spent"}
    data, starts = fake(items, {}, resume=True)
    assert data["failed"] == {}
    assert data["done"] == [item.name for item in items]
    _, starts = fake(items, {}, resume=True)
    assert starts == []


def test_an_item_that_the_budget_cuts_is_left_out(fake, monkeypatch):
    items = gpu_plan.plan([TINY], ("ours",))[:1]
    monkeypatch.setattr(gpu_run, "LEAST_SECONDS", -10)
    data, _ = fake(items, {items[0].name: gpu_child.TooLong()}, seconds=0.0)
    assert data["failed"] == {items[0].name: "left out: the time budget ended meanwhile"}
    assert data["done"] == []


def test_resume_refuses_the_results_of_another_machine(fake):
    items = gpu_plan.plan([TINY], ("ours",))
    fake(items[:1], {})
    with pytest.raises(SystemExit, match="expected device to have value 'd', got 'another'"):
        fake(items, {}, resume=True, device="another")


def test_without_resume_an_earlier_file_is_kept(fake, tmp_path):
    items = gpu_plan.plan([TINY], ("ours",))
    fake(items[:1], {})
    fake(items[1:], {})
    assert json.loads((tmp_path / "gpu-1.json").read_text())["done"] == [items[0].name]


def test_a_cut_while_the_file_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    def cut(*args):
        raise KeyboardInterrupt

    report = gpu_file.Report(tmp_path / "gpu.json")
    report.done("first")
    monkeypatch.setattr(gpu_file.os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        report.done("second")
    assert json.loads((tmp_path / "gpu.json").read_text())["done"] == ["first"]


def test_rows_get_their_share_of_a_limit_that_is_measured_later(tmp_path):
    report = gpu_file.Report(tmp_path / "gpu.json")
    report.add("measurements", {"shape": "tiny", "op": "x", "ms": 2.0, "extra_gib": 0.0, "flops": 1e6, "bytes": 1.0})
    report.add("limits", {"tiny": {"flops_per_s": 1e9, "bytes_per_s": 1e9}})
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["measurements"]  # saved with the row, not with its item
    assert row["of_limit"] == pytest.approx(0.5)


def test_a_test_that_fails_is_named_and_the_others_are_counted(tmp_path):
    report = gpu_file.Report(tmp_path / "gpu.json")
    for outcome in ("passed", "passed", "skipped"):
        report.add("test", {"test": "t", "outcome": outcome})
    report.add("test", {"test": "a", "outcome": "failed", "reason": "E"})
    assert report.data["tests"] == {"passed": 2, "skipped": 1, "failed": {"a": "E"}}
    report.forget_tests()
    assert report.data["tests"] == {}


def test_a_broken_wheel_is_a_row(tmp_path):
    wheels, out = tmp_path / "wheels", tmp_path / "out"
    wheels.mkdir()
    (wheels / "broken-1.0-py3-none-any.whl").write_bytes(b"not a zip file")
    report = gpu_file.open_report(out / "gpu.json", False)
    run = gpu_run.Run(report, 60.0, None, [], out / "peers", gpu_plan.LIMITS)
    gpu.install(run, wheels)
    (reason,) = report.data["failed"].values()
    assert reason.startswith("ERROR: Wheel 'broken' located at")


def wheel(folder, name, files):
    """A wheel of these files, as small as pip accepts."""
    info = f"{name}-1.0.dist-info"
    metadata = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, text in (files | metadata).items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in archive.namelist()))


def test_wheels_may_share_a_folder_and_have_pth_files(tmp_path):
    """As those of the CUTLASS DSL do: one has a file that extends the path when Python starts."""
    (tmp_path / "wheels").mkdir()
    wheel(tmp_path / "wheels", "one", {"shared/a.py": "", "one.pth": "import sys; sys.read_pth = True\n"})
    wheel(tmp_path / "wheels", "two", {"shared/b.py": ""})
    report = gpu_file.open_report(tmp_path / "gpu.json", False)
    run = gpu_run.Run(report, 60.0, None, [], tmp_path / "peers" / "site-packages", gpu_plan.LIMITS)
    gpu.install(run, tmp_path / "wheels")
    assert report.data["failed"] == {}
    code = "import sys, shared.a, shared.b; assert sys.read_pth"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(run.packages)}, check=True)


def test_modules_are_found_in_the_folder_of_the_wheels(tmp_path):
    (tmp_path / "some_peer").mkdir()
    (tmp_path / "some_peer" / "__init__.py").touch()
    assert not gpu.is_missing("some_peer", tmp_path)
    assert gpu.is_missing("some_peer", tmp_path / "other")
    assert not gpu.is_missing(None, tmp_path)


@pytest.mark.slow
def test_kernels_compiled_ahead_are_found_by_a_launch(tmp_path):
    """Without `ahead.fix_keys` the gradient kernel is compiled again."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, str(ROOT / "tests" / "compile_twice.py")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    ahead, after = json.loads(result.stdout)
    assert ahead == {"_sweep_kernel": 1, "_gradient_kernel": 1}
    assert {kernel: after[kernel] for kernel in ahead} == ahead


FEW_TESTS = """
import pytest

def test_a(): pass
def test_b(): raise ValueError("no")
def test_c(): pass
@pytest.mark.skip
def test_d(): pass
"""


def test_the_outcome_of_every_test_is_a_row(tmp_path):
    (tmp_path / "test_few.py").write_text(FEW_TESTS)
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu_pytest", "--fd", str(writing), "--rootdir"]
    command += [str(tmp_path), "-c", os.devnull, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, pass_fds=[writing], capture_output=True, check=False)
    os.close(writing)
    with os.fdopen(reading) as stream:
        messages = [json.loads(line) for line in stream]
    found = [(message["values"]["test"][-1], message["values"]["outcome"]) for message in messages]
    assert found == [("a", "passed"), ("b", "failed"), ("c", "passed"), ("d", "skipped")]
    assert messages[1]["row"] == "test"
    assert messages[1]["values"]["reason"].endswith("ValueError")


def test_every_test_is_in_one_shard():
    found = []
    for shard in range(3):
        items = list("abcdefgh")
        config = SimpleNamespace(getoption=lambda name, shard=shard: f"{shard}/3")
        gpu_pytest.pytest_collection_modifyitems(config, items)
        found += items
    assert sorted(found) == list("abcdefgh")


def test_the_plan_has_the_peers_of_peers_py():
    assert gpu_plan.PEERS.keys() == peers._peers("cuda").keys()
    assert len({item.name for item in gpu_plan.plan(models.SHAPES)}) == len(gpu_plan.plan(models.SHAPES))


def test_the_parent_does_not_import_torch():
    """It starts at once, and holds no context of the device."""
    code = "import sys, benchmarks.gpu; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
