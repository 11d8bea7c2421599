"""What the GPU benchmarks and the tuner do in their child process, at a tiny size, on the GPU or in the interpreter."""

import re
from dataclasses import replace

import pytest
import torch

from cwdpo_kernels import ops

pytest.importorskip("triton")
from benchmarks import (
    cost,
    gpu,
    gpu_file,
    gpu_measure,
    gpu_peers,
    gpu_plan,
    gpu_report,
    gpu_sharing,
    gpu_step,
    gpu_work,
    models,
    sharing,
    tune,
    tune_work,
)
from cwdpo_kernels.triton import configs

TINY = models.Shape("tiny", tokens=40, vocab=300, dim=64)
SMALL = (40, 300, 64)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = dict(zip(tune.NAMES, (32, 64, 32, 4, 1, 2, True), strict=True))


@pytest.fixture
def triton_on_device(monkeypatch):
    """Everything is on the device that Triton runs on. Without a GPU a step is timed by calling it."""
    monkeypatch.setattr(gpu_work, "DEVICE", DEVICE)
    monkeypatch.setattr(gpu_work, "VALUE_SIZE", SMALL)
    if DEVICE == "cpu":
        monkeypatch.setattr(gpu_measure, "measure", lambda steps: {op: run_once(step) for op, step in steps.items()})
        monkeypatch.setattr(tune_work, "REPEATS", 1)
        monkeypatch.setattr(gpu_measure, "milliseconds", lambda step: run_once(step)["ms"])
    with torch.device(DEVICE), ops.forced(DEVICE, "triton"), torch.compiler.set_stance("force_eager"):
        yield


def run_once(step):
    step()
    return {"ms": 1.0, "extra_gib": 1.0}


def do(item, tmp_path):
    """The rows of an item, as (kind, row)."""
    rows = []
    gpu_work.do(item.request(), tmp_path, -1, lambda kind, row: rows.append((kind, row)))
    return rows


@pytest.mark.parametrize("part", ["ours", "logits", "other"])
def test_every_timing_runs_and_has_a_cost(part, triton_on_device, tmp_path):
    for item in gpu_plan.plan([TINY], (part,)):
        ((kind, row),) = do(item, tmp_path)
        assert (kind, row["shape"], row["op"], row["ms"]) == ("measurements", "tiny", item.op, 1.0)
        assert row["flops"] > 0
        assert row["bytes"] > 0


def test_shared_prompts_are_a_row_for_each_way(monkeypatch, triton_on_device, tmp_path):
    small = sharing.Shape(0, vocab=300, dim=64, layers=1, heads=4, groups=2, dtype=gpu_sharing.MODEL.dtype)
    monkeypatch.setattr(gpu_sharing, "MODEL", small)
    item = gpu_plan.plan([], ("sharing",), prompts=["24 : 8"])[0]
    found = do(item, tmp_path)
    assert [(kind, row["lengths"], row["way"]) for kind, row in found] == [
        ("shared", "24 : 8", "separate"), ("shared", "24 : 8", "shared")
    ]  # fmt: skip
    assert 0 < found[0][1]["difference"] < gpu_sharing.TOLERANCE
    table = gpu_report.shared({"shared": [row for _, row in found]})[0]
    assert "| 24 : 8 | 1 ms, 1.0 GiB | 1 ms, 1.0 GiB | 1.00 | 1.00 |" in table
    assert gpu_report.shared({"shared": [found[0][1]]}) == []
    monkeypatch.setattr(gpu_sharing, "TOLERANCE", 0.0)
    with pytest.raises(SystemExit, match="gradients differ"):
        do(item, tmp_path)


def test_every_step_of_ours_is_in_the_plan():
    with torch.device("meta"):
        assert gpu_work.linear_steps(TINY).keys() == {*gpu_plan.LINEAR, *gpu_plan.OTHER}
        assert gpu_work.logits_steps(TINY).keys() == set(gpu_plan.LOGITS)


def test_half_of_the_gradients_zero_costs_the_forward_and_half_of_the_backward():
    product = 2 * 40 * 300 * 64
    with torch.device("meta"):
        _, needed = gpu_work.linear_steps(TINY)["half of the gradients 0, sparse"]
    assert needed.flops == product + 3 * product / 2


def test_a_peer_is_timed_and_one_that_cannot_run_says_why(monkeypatch, triton_on_device, tmp_path):
    def broken(*args):
        raise RuntimeError("no kernel\nfor this chip")

    found = gpu_peers.peers.implementations(DEVICE)
    found["broken"] = replace(found["eager, full logits"], logp=broken)
    monkeypatch.setattr(gpu_peers.peers, "implementations", lambda device: found)
    monkeypatch.setattr(gpu_peers.peers, "cannot_run", lambda device: {"absent": "not installed"})
    eager, _, bad, _, absent, _ = gpu_plan.plan(
        [TINY], ("peers",), dict.fromkeys(["eager, full logits", "broken", "absent"])
    )
    ((_, row),) = do(eager, tmp_path)
    assert row["op"] == "eager, full logits, frozen"
    assert row["flops"] == 2 * 2 * 40 * 300 * 64
    for item, reason in ((bad, "RuntimeError: no kernel"), (absent, "RuntimeError: not installed")):
        with pytest.raises(RuntimeError) as caught:
            do(item, tmp_path)
        assert gpu_work.first_line(caught.value) == reason


@pytest.mark.parametrize("case", gpu_plan.VALUES)
def test_values_are_rows_and_a_wrong_one_fails_its_item(case, monkeypatch, triton_on_device, tmp_path):
    item = next(item for item in gpu_plan.plan([TINY], ("values",)) if item.op == case)
    rows = do(item, tmp_path)
    names = ["logp", "grad_hidden", "grad_weight", *(["grad_bias"] if "bias" in case else [])]
    assert [(kind, row["case"], row["value"]) for kind, row in rows] == [("values", case, name) for name in names]
    factor = 50.0 if "0.999" in case else 1.05  # eager, too, is off by its whole value there
    wrong = lambda *args: gpu_work.reference.linear_logprob(*args) * factor  # noqa: E731
    monkeypatch.setattr(gpu_work.ck, "linear_logprob", wrong)
    with pytest.raises(AssertionError, match="relative error"):
        do(item, tmp_path)


def test_limits_have_all_three_products(monkeypatch, triton_on_device, tmp_path):
    monkeypatch.setattr(gpu_work, "COPIED_BYTES", 1 << 10)
    (item,) = gpu_plan.plan([TINY], ("limits",))
    ((kind, row),) = do(item, tmp_path)
    assert (kind, row.keys(), row["tiny"]["gemm_ms"].keys()) == (
        "limits", {"tiny"}, {"logits", "grad_hidden", "grad_weight"},
    )  # fmt: skip
    if DEVICE == "cpu":
        assert row["tiny"]["flops_per_s"] == pytest.approx(2 * 40 * 300 * 64 * 1e3)
        assert row["tiny"]["bytes_per_s"] == pytest.approx(2 * (1 << 10) * 1e3)


def test_the_tuner_times_each_kernel_alone(triton_on_device):
    rows = []
    tune_work.do("tune", f'{{"dtype": "float32", "config": {to_json(CONFIG)}}}', TINY, lambda *row: rows.append(row))
    assert [(kind, row["kernel"]) for kind, row in rows] == [("tuned", name) for name in tune.KERNELS]
    assert {row["config"] for _, row in rows} == {tune.text(CONFIG)}
    if DEVICE == "cpu":
        assert {row["ms"] for _, row in rows} == {1.0}  # each launch covers the whole vocabulary


def test_the_tuner_launches_with_the_candidate(triton_on_device):
    with tune_work.configured("float32", CONFIG):
        config = configs.tile_config(torch.randn(2, 64))
    assert {name: getattr(config, name) for name in tune.NAMES} == CONFIG


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_the_tuner_rejects_a_candidate_with_wrong_results(wrong, monkeypatch, triton_on_device):
    right = tune_work.expected(TINY, "float32")
    changed = tuple(x * 1.05 if i == wrong else x for i, x in enumerate(right))
    monkeypatch.setattr(tune_work, "expected", lambda *args: changed)
    with pytest.raises(ValueError, match=r"expected the result of the current row, got a relative error of 0\.0"):
        tune_work.time_candidate(TINY, "float32", CONFIG)


def to_json(value):
    return str(value).replace("'", '"').replace("True", "true")


def test_the_tuner_compiles_once_and_times_in_random_order(tmp_path):
    report, found = gpu_file.Report(tmp_path / "tune.json"), tune.candidates()
    assert len({tune.text(config) for config in found}) == len(found)
    first, *timings = tune.items(report, TINY, "bfloat16", found)
    assert (first.kind, {item.kind for item in timings}) == ("tune compile", {"tune"})
    names = [item.name for item in timings]
    in_order = [f"D 64, bfloat16, {tune.text(config)}" for config in found]
    assert names != in_order
    assert sorted(names) == sorted(in_order)
    assert [item.name for item in tune.items(report, TINY, "bfloat16", found)][1:] == names  # the same after --resume
    for i, config in enumerate(found):
        problem = "_sweep_kernel: 8 bytes spilled" if i == 3 else ""
        report.add("candidates", {"dim": 64, "dtype": "bfloat16", "config": tune.text(config), "problem": problem})
    items = tune.items(report, TINY, "bfloat16", found)
    assert [item.name for item in items] == names
    dropped = {item.name for item in items if tune.problem_of(report, item)}
    assert dropped == {f"D 64, bfloat16, {tune.text(found[3])}"}


def test_the_winner_of_each_kernel_and_of_both():
    times = {"a": (1.0, 9.0), "b": (2.0, 5.0), "c": (7.0, 1.0), "half timed": (0.5,)}
    rows = [
        {
            "chip": "sm_90", "precision": "half", "dtype": "bfloat16", "dim": 64, "descriptors": True,
            "config": config, "kernel": k, "ms": ms,
        }
        for config, both in times.items()
        for k, ms in zip(tune.KERNELS, both, strict=False)
    ]  # fmt: skip
    lines = tune.winners({"tuned": rows, "environment": {"device": "a GPU"}})
    assert [re.search(r"([\d.]+) ms .*TileConfig\((\w)", line).groups() for line in lines] == [
        ("1.000", "a"), ("1.000", "c"), ("7.000", "b"),
    ]  # fmt: skip
    row = '("sm_90", "half", 64): TileConfig(b, descriptors=True, source="timed on a GPU, bfloat16, D 64")'
    assert row in lines[2]


def test_a_printed_row_can_be_pasted():
    """With the key of configs.TILES, and with what the timed kernels had: descriptors are not among the candidates."""
    config, shape = tune.candidates()[0], replace(TINY, dim=576)
    with tune_work.on_chip("sm_90"):
        rows = [tune_work.describe(shape, "bfloat16", config) | {"kernel": k, "ms": 1.0} for k in tune.KERNELS]
    line = tune.winners({"tuned": rows, "environment": {"device": "a GPU"}})[2]
    pasted = eval(f"{{{line.split(' ms ')[1]}}}", {"TileConfig": configs.TileConfig})
    row = configs.TileConfig(**config, descriptors=True, source="timed on a GPU, bfloat16, D 576")
    assert pasted == {("sm_90", "half", 576): row}


@pytest.mark.parametrize("error", [ValueError("no\nmore"), SystemExit("no\nmore")])
def test_whatever_an_item_raises_is_its_reason(error, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_work, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_work, "do", lambda *args: (_ for _ in ()).throw(error))
    message = gpu_step.do({"name": "x"}, tmp_path, -1, print)
    assert message == {"failed": "x", "reason": f"{type(error).__name__}: no", "fatal": False}


def test_cost_of_a_7b_model():
    """Worked out by hand: 2 N D V operations per product, with N 8192, V 151936, D 4096."""
    product = 2 * 8192 * 151936 * 4096
    for mode, products in (("no_grad", 1), ("frozen", 2), ("trainable", 4)):
        assert cost.linear_logprob(8192, 4096, 151936, 2, mode).flops == products * product
    assert cost.linear_logprob(8192, 4096, 151936, 2, "trainable", kept_share=1.0).flops == 3 * product
    assert cost.logits_logprob(8192, 151936, 2, backward=True).bytes == 3 * 8192 * 151936 * 2
    with pytest.raises(ValueError, match=re.escape("got 'half'")):
        cost.linear_logprob(1, 1, 1, 2, "half")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_exits_with_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr("signal.signal", lambda *args: None)  # it would replace pytest's
    monkeypatch.setattr("sys.argv", ["benchmark", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="expected a GPU"):
        gpu.main()
