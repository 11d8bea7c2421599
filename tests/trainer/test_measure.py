"""`cwdpo probe`, `cwdpo eval` and `cwdpo demo` through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cwdpo_trainer.cli import main


def test_probe_reproduces_the_metrics_of_a_run(finished, task, tmp_path, capsys):
    target = tmp_path / "probe.json"
    assert main(["probe", str(finished), str(task / "heldout_many.jsonl"), "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    metrics = json.loads((finished / "metrics.json").read_text())
    expected = metrics["after_cwdpo"]["probes"]
    expected.pop("step")
    assert result["metrics"]["model"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert result["metrics"]["reference"]["chosen_delta_logp"] == 0
    before, after = (result["metrics"][name]["chosen_logp"] for name in ("reference", "model"))
    assert after - before == pytest.approx(expected["chosen_delta_logp"], rel=1e-4)
    found = {finding["name"] for finding in metrics["findings"] if finding["stage"] == "dpo"}
    assert {finding["name"] for finding in result["findings"]} == found != set()
    assert result["answers"] == {"chosen": 40, "near": 20, "easy": 20, "onpolicy": result["answers"]["onpolicy"]}
    printed = capsys.readouterr().out
    assert f"{before:.3f} -> {after:.3f}" in printed
    assert result["answers"] == metrics["after_cwdpo"]["answers"]
    for name, count in result["answers"].items():
        assert f" {name} (n = {count})" in printed
    assert all(f"found {name}: " in printed for name in found)
    assert str(target) in printed


def test_probe_of_a_model_with_and_without_a_reference(finished, task, tmp_path, capsys):
    target, data = tmp_path / "probe.json", str(task / "heldout.jsonl")
    assert main(["probe", str(finished / "sft"), data, "--rows", "4", "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    assert result["reference"] is None
    assert not any("delta" in name or name.endswith(("_tv", "_js")) for name in result["metrics"]["model"])
    assert result["answers"]["chosen"] == 4
    assert result["findings"] == []
    printed = capsys.readouterr().out
    assert "no reference to compare with" in printed
    assert "\nn = 4 answers are too few for a diagnosis (20 needed)\n" in printed
    assert "the doctor found nothing" not in printed
    data = str(task / "heldout_many.jsonl")
    arguments = ["probe", str(finished / "sft"), data, "--reference", str(task / "model"), "--json", str(target)]
    assert main(arguments) == 0
    metrics = json.loads((finished / "metrics.json").read_text())
    model = json.loads(target.read_text())["metrics"]["model"]
    assert model["chosen_delta_logp"] == pytest.approx(metrics["after_sft"]["probes"]["chosen_delta_logp"], rel=1e-4)


def test_eval_reproduces_the_scores_of_a_run(finished, task, tmp_path, capsys):
    target = tmp_path / "eval.json"
    assert main(["eval", str(finished), str(task / "heldout_many.jsonl"), "--rows", "12", "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    metrics = json.loads((finished / "metrics.json").read_text())["after_cwdpo"]
    assert (result["exact_match"], result["cider"]) == (metrics["exact_match"], metrics["cider"])
    lines = (finished / "predictions.jsonl").read_text().splitlines()
    assert [entry["caption"] for entry in result["captions"]] == [json.loads(li)["caption_after_cwdpo"] for li in lines]
    assert f"12 captions, exact match {metrics['exact_match']:.3f}, CIDEr {metrics['cider']:.1f}" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["probe", "./nowhere", "DATA"], "RUN_OR_MODEL: expected an existing folder or a name on the Hub, got nowhere"),
        (["eval", "~/nowhere", "DATA"], "RUN_OR_MODEL: expected an existing folder or a name on the Hub, got /"),
        (
            ["probe", "MODEL", "DATA", "--reference=~/nowhere"],
            "--reference: expected an existing folder or a name on the Hub, got /",
        ),
        (["eval", "EMPTY", "DATA"], "expected a vision-language model with its processor"),
        (["probe", "UNFINISHED", "DATA"], "expected at least 1 finished stage, got none"),
        (["probe", "MODEL", "./nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_input_errors_are_reported(arguments, message, task, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "run.json").write_text(json.dumps({"config": {"model": {"path": "x"}}, "inputs": {}}))
    paths = {"DATA": task / "heldout.jsonl", "EMPTY": tmp_path / "empty", "MODEL": task / "model",
              "UNFINISHED": tmp_path / "unfinished"}  # fmt: skip
    assert main([str(paths.get(word, word)) for word in arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_path_may_start_with_the_home_folder(finished, task, tmp_path, monkeypatch):
    """A shell leaves the ~ of `--json=~/file` as it is."""
    monkeypatch.setenv("HOME", str(finished.parent))
    monkeypatch.chdir(tmp_path)
    arguments = [f"~/{finished.name}", str(task / "heldout.jsonl"), "--rows=2", "--json=~/home/eval.json"]
    assert main(["eval", *arguments]) == 0
    assert len(json.loads((finished.parent / "home" / "eval.json").read_text())["captions"]) == 2
    assert not list(tmp_path.iterdir())


def test_demo_is_the_packaged_recipe(monkeypatch):
    started = []
    monkeypatch.setattr("cwdpo_trainer.run.run", lambda config, only: started.append((config, only)))
    assert main(["demo", "sft.max_steps=1"]) == 0
    ((config, only),) = started
    assert only is None
    assert config.output_dir == Path("runs/digits")
    assert config.sft.max_steps == 1
    assert config.raw["prepare"]["function"] == "cwdpo_trainer.recipes.digits:prepare"
