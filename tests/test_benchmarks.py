"""The CPU benchmarks run at a tiny size and refuse to report wrong results."""

import json
import os
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cwdpo_kernels as ck
from cwdpo_kernels import reference
from cwdpo_kernels.testing import confident_inputs

pytest.importorskip("transformers")
from benchmarks import (
    accuracy,
    entropy,
    linear,
    logits,
    memory,
    peers,
    real_model,
    results,
    run,
    scaling,
    timing,
    trainer_step,
    workloads,
)  # fmt: skip
from benchmarks.workloads import Workload

ROOT = Path(__file__).parents[1]
TINY = Workload("tiny", pairs=2, tokens=24, response=8, vocab=700, dim=32)
TINY_LOGITS = logits.LogitsWorkload("tiny", 40, 700, torch.bfloat16)
TINY_TRAINER = trainer_step.Shape(vocab=300, dim=32, layers=1, image_size=16, response=6)


@pytest.fixture(autouse=True)
def small_and_plain():
    """One thread, because the tensors are tiny, and eager mode, which gives the same results as compiled peers."""
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        yield


def here(function, *args):
    """Stands in for a worker. Memory is then measured in this process, so its values mean nothing."""
    return function(*args)


@pytest.mark.parametrize("mode", workloads.MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_peer_computes_the_step(mode, dtype):
    workload = replace(TINY, dtype=dtype)
    found = linear.applicable(workload, mode)
    expected = {"frozen": {"grad_hidden"}, "trainable": {"grad_hidden", "grad_weight"}}
    tolerance = 2e-6 if dtype == torch.float32 else 0.02
    for name, error in linear.errors(workload, mode, workload.make(mode), found).items():
        of_logp = {"logp"} if found[name].logp is not None else set()
        assert error.keys() == {"loss"} | expected.get(mode, of_logp), name
        assert max(error.values()) < tolerance, name
    installed = {"cwdpo_kernels", "eager, full logits", *(["cwdpo_kernels, none kept"] * (mode == "trainable"))}
    assert found.keys() >= installed


def test_a_peer_that_cannot_run_is_named_with_the_reason(monkeypatch):
    assert peers.cannot_run("cpu")["Liger scaled cross-entropy"] == "its kernel is for GPUs"
    assert not peers.cannot_run("cpu").keys() & peers.implementations("cpu").keys()
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    missing = {name: peer for name, peer in peers._peers.__wrapped__("cpu").items() if isinstance(peer, str)}
    assert missing["torch.compile, full logits"] == "torch.compile needs a C++ compiler"
    assert missing["TRL chunked log-prob"] == "not installed"


def test_a_step_is_measured_with_its_peers():
    measured = linear.measure(TINY, "trainable", 3, here)
    assert measured["workload"]["labeled"] == 2 * 2 * 8
    assert 0 <= measured["others"] <= 1
    assert measured["limit_seconds"] == pytest.approx(sum(measured["gemm_seconds"].values()))
    medians = {name: result["median_seconds"] for name, result in measured["results"].items()}
    fastest = min(median for name, median in medians.items() if not name.startswith("cwdpo_kernels"))
    for name, result in measured["results"].items():
        assert len(result["seconds"]) == 3
        assert result["of_limit"] == pytest.approx(measured["limit_seconds"] / medians[name])
        if name.startswith("cwdpo_kernels"):
            assert result["against_best_peer"] == pytest.approx(medians[name] / fastest)
    json.dumps(measured)


@pytest.mark.parametrize(
    ("name", "mode", "what"), [("linear_cwdpo_loss", "frozen", "grad_hidden"), ("linear_logprob", "no_grad", "logp")]
)
def test_a_wrong_step_is_not_reported(monkeypatch, name, mode, what):
    right = getattr(ck, name)

    def wrong(hidden, *args, **kwargs):
        value = right(hidden, *args, **kwargs)
        return value * 1.001 if what == "logp" else value._replace(loss=value.loss + 1e-3 * hidden.sum() * 1e-3)

    monkeypatch.setattr(peers.ck, name, wrong)
    message = f"^tiny/{mode}: cwdpo_kernels: expected a relative error of .*: nothing is reported$"
    with pytest.raises(SystemExit, match=message):
        linear.measure(TINY, mode, 1, here)


@pytest.mark.parametrize("mode", logits.MODES)
def test_logits_are_measured_and_checked(monkeypatch, mode):
    measured = logits.measure(TINY_LOGITS, mode, 2, here)
    assert {"cwdpo_kernels", "eager"} <= measured["results"].keys()
    assert ("cwdpo_kernels, reuse_logits" in measured["results"]) == (mode == "backward")
    for result in measured["results"].values():
        assert max(result["relative_error"].values()) < 0.01
    json.dumps(measured)
    monkeypatch.setattr(logits.ck, "logits_logprob", lambda *args, **options: reference.logits_logprob(*args))
    with pytest.raises(SystemExit, match="nothing is reported"):  # bfloat16 log-probs
        logits.measure(TINY_LOGITS, mode, 1, here)


def test_accuracy_by_probability():
    errors = {p: accuracy.measure(torch.bfloat16, p, 16, 600, 64)["relative_error"] for p in (0.5, 0.999)}
    assert errors[0.999]["cwdpo_kernels"]["logp"] < 1e-5 < 1e-3 < errors[0.999]["eager, full logits"]["logp"]
    assert errors[0.999].keys() == {
        name for name, x in peers.implementations().items() if x.logp and not x.only_trainable
    }


@pytest.mark.parametrize("mode", ["frozen", "trainable", "reported"])
def test_entropies_are_measured_and_checked(mode, monkeypatch):
    workload = TINY
    entry = entropy.measure(workload, mode, 1, lambda function, *args: 2**20)
    ours, theirs = entry["results"]["cwdpo_kernels"], entry["results"]["TRL fused head"]
    assert max(ours["relative_error"].values()) < 1e-5
    assert set(ours["relative_error"]) == set(theirs["relative_error"])
    assert ours["extra_mib"] == 1.0
    assert ours["against_best_peer"] > 0
    monkeypatch.setattr(entropy, "_ours", lambda mode, *args: tuple(1.01 * x for x in entropy._reference(*args)))
    with pytest.raises(SystemExit, match="expected a relative error of logp of at most"):
        entropy.measure(workload, mode, 1, lambda function, *args: 2**20)


def test_a_real_models_tokens_are_grouped_by_probability():
    flat, head, labels = confident_inputs(0.95, 40, 300, 64, torch.bfloat16)
    groups = real_model.measure(flat.detach(), ck.Head(head.weight.detach()), labels)
    assert [group["tokens"] for group in groups] == [0, 0, 40, 0, 0]
    error = groups[2]["error"]
    assert error["cwdpo_kernels"]["entropy"]["max"] < 1e-5 < error["eager, full logits"]["entropy"]["max"]
    assert set(error["cut-cross-entropy"]) == {"logp"}


def test_both_heads_give_the_same_trainer_step(monkeypatch):
    measured = trainer_step.measure(True, 2, here, TINY_TRAINER)
    for result in measured["results"].values():
        assert result["pairs_per_second"] == pytest.approx(2 / result["median_seconds"])
    json.dumps(measured)

    def wrong(hidden, head, labels, *args, **options):
        return ck.linear_preference_loss(hidden, head, labels.roll(1, 0), *args, **options)

    monkeypatch.setitem(trainer_step.PATHS["fused"], "linear_preference_loss", wrong)
    with pytest.raises(SystemExit, match="losses differ, nothing is reported"):
        trainer_step.measure(False, 2, here, TINY_TRAINER)


def peak_of_64_mib(_):
    gradient = torch.ones(1 << 22)  # 16 MiB
    torch.ones(1 << 24).sum()  # 64 MiB, freed
    return [gradient]


def no_inputs():
    return None


def test_peak_memory_includes_freed_memory_but_not_gradients():
    """In a worker, as the benchmarks measure: the system may reclaim idle memory of a process that has run a lot."""
    with memory.worker(warm_up=False) as call:
        call(memory.extra_bytes, no_inputs, peak_of_64_mib)  # torch allocates what it keeps
        assert call(memory.extra_bytes, no_inputs, peak_of_64_mib) / 2**20 == pytest.approx(64, abs=2)


def test_peak_memory_is_measured_again_after_a_compilation(monkeypatch):
    graphs = iter((0, 1, 1, 1))  # before and after the first trial, then the second
    monkeypatch.setattr(memory, "_compiled_graphs", lambda: next(graphs))
    kept = []

    def step(mib):
        kept.append(torch.ones(mib << 18))
        return []

    sizes = iter((96, 32))
    assert memory.extra_bytes(lambda: next(sizes), step) / 2**20 == pytest.approx(32, abs=2)


def test_the_worker_is_a_separate_process():
    with memory.worker(warm_up=False) as call:
        assert call(os.getpid) != os.getpid()
        assert call(os.getpid) == call(os.getpid)


def test_repetitions_are_interleaved_and_slow_steps_repeat_less():
    order = []

    def step(name, seconds):
        order.append(name)
        return seconds

    times = timing.interleaved({"fast": lambda: step("fast", 0.1), "slow": lambda: step("slow", 5.0)}, 5)
    assert order[:4] == ["fast", "slow", "fast", "slow"]
    assert (len(times["fast"]), len(times["slow"])) == (5, 2)
    assert timing.summary([3.0, 1.0, 2.0, 9.0, 4.0])["median_seconds"] == 3.0
    assert timing.summary([3.0])["quartiles"] == [3.0, 3.0]


def test_the_share_of_other_processes():
    """Of 1000 ticks of all CPUs, 400 are idle and 550 are ours."""
    assert timing._share_of_others(1000, 400, 550) == pytest.approx(0.05)
    assert timing._share_of_others(1000, 400, 601) == 0.0  # the two clocks have different resolutions
    with timing.others() as others:
        sum(range(100_000))
    assert 0 <= others() <= 1


@pytest.fixture
def suite(monkeypatch):
    """A suite of two measurements that count how often they run."""
    made = {"a": 0, "b": 0}

    def measure(name):
        def measured(repeats, call):
            made[name] += 1
            return {"made": made[name]}

        return measured

    module = SimpleNamespace(measurements=lambda: {name: measure(name) for name in made})
    monkeypatch.setattr(run, "SUITES", {"fake": module})
    monkeypatch.setattr(results, "check_build", lambda: None)
    monkeypatch.setattr(results, "commit", lambda: "c1")
    monkeypatch.setattr(results, "environment", lambda: {"device": "here"})
    return made


def test_an_interrupted_run_resumes(suite, tmp_path, monkeypatch, capsys):
    out = ["--results", str(tmp_path)]
    run.main(["--only", "fake/a", *out])
    run.main(["--resume", *out])
    assert suite == {"a": 1, "b": 1}
    run.main(["--only", "fake/b", *out])
    assert [entry["made"] for entry in results.load("fake", tmp_path)["measurements"]] == [1, 2]
    monkeypatch.setattr(results, "commit", lambda: "c2")
    run.main(["--resume", *out])
    assert suite == {"a": 2, "b": 3}
    assert {entry["commit"] for entry in results.load("fake", tmp_path)["measurements"]} == {"c2"}
    assert re.search(r"\[ 2/2\] fake/b .* s in total", capsys.readouterr().out)

    monkeypatch.setattr(results, "environment", lambda: {"device": "there"})
    with pytest.raises(SystemExit, match="expected environment to have value"):
        run.main(["--resume", *out])
    run.main(out)
    assert results.load("fake", tmp_path)["environment"] == {"device": "there"}
    with pytest.raises(SystemExit):
        run.main(["--only", "fake/c", *out])


def test_an_outdated_library_is_not_measured(tmp_path):
    library, source = tmp_path / "libcwdpo_cpu.so", tmp_path / "csrc" / "cpu" / "rows.cpp"
    source.parent.mkdir(parents=True)
    for path in (library, source):
        path.touch()
    os.utime(source, (1000, 1000))
    results.check_build(tmp_path, tmp_path / "csrc")
    os.utime(source, (library.stat().st_mtime + 10,) * 2)
    with pytest.raises(SystemExit, match=re.escape("libcwdpo_cpu.so: expected a library newer than csrc")):
        results.check_build(tmp_path, tmp_path / "csrc")


def test_the_commit_says_whether_the_code_differs():
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", results.commit())


class OneRound:
    """Stands in for the fixture of pytest-benchmark."""

    def pedantic(self, function, args, setup, **options):
        setup()
        function(*args)


def test_pytest_benchmark_runs_only_on_request():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert options["testpaths"] == ["tests"]
    assert "bench_*.py" in options["python_files"]
    from benchmarks import bench_linear, bench_ops

    assert bench_ops.WORKLOAD in {case.values[0] for case in bench_linear.CASES}
    benchmark = OneRound()
    bench_linear.test_step(benchmark, TINY, "trainable", peers.implementations()["cwdpo_kernels"])
    assert benchmark.group == "tiny/trainable"


def test_the_prediction_for_many_threads_is_amdahls_law():
    found = scaling.prediction([1.0, 1.0, 1.0], [0.55, 0.5, 0.6])
    assert found["serial_seconds"] == pytest.approx([0.05, 0.1, 0.15])
    assert found["predicted_seconds"]["16"] == pytest.approx([0.05 + 0.95 / 16, 0.1 + 0.9 / 16, 0.15 + 0.85 / 16])


@pytest.mark.skipif(ck.backend("cpu") != "csrc", reason="the threads of the C++ backend")
def test_scaling_is_measured_on_every_number_of_threads():
    measured = scaling.measure(replace(TINY, vocab=20000), "trainable", 2, here)
    assert next(iter(measured["threads"])) == "1"
    assert all(len(timed["seconds"]) == 2 for timed in measured["threads"].values())
    assert torch.get_num_threads() == 1
    assert measured["regions"] <= 2


def test_all_threads_are_moved_to_one_core_and_back():
    cores = os.sched_getaffinity(0)
    with scaling.on_one_core():
        assert os.sched_getaffinity(0) == {min(cores)}
    assert os.sched_getaffinity(0) == cores
