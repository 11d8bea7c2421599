"""Model cards: saved with each model of a run, and uploaded by `push_to_hub`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers.trainer
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from cwdpo_trainer.cli import main
from cwdpo_trainer.evaluation.card import Origin, make_card
from cwdpo_trainer.evaluation.summary import table


def section(card, title):
    return card.text.split(f"## {title}\n")[1].split("\n## ")[0].strip()


@pytest.mark.parametrize(("name", "label"), [("sft", "after_sft"), ("cwdpo", "after_cwdpo")])
def test_the_card_shows_the_metrics_of_the_run(finished, name, label):
    metrics = json.loads((finished / "metrics.json").read_text())
    card = ModelCard.load(finished / name / "README.md")
    assert card.data.model_name == f"run-{name}"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert {"cwdpo", "dpo"} <= set(card.data.tags)
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None  # a folder, not a name on the Hub
    assert "Fine-tuned from `model`" in card.text
    expected = {**metrics[label], **metrics[label]["probes"]}
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert {"exact_match", "cider", "chosen_delta_logp", "chosen_ece", "near_logp", "chosen_tv"} <= results.keys()
    assert results == {key: expected[key] for key in results}
    rows = [line.split(" | ") for line in section(card, "Metrics on held-out rows").splitlines() if line[:2] == "| "]
    shown = {row[0].strip("| "): row[-1].strip("| ") for row in rows}
    for line in table(metrics):
        if line.values[label] is not None:
            assert shown[line.title] == format(line.values[label], line.format)
    assert ("after CW-DPO" in card.text) == (name == "cwdpo")
    with Image.open(finished / name / "dynamics.png") as plot:
        assert plot.width > 1000
    assert "](dynamics.png)" in card.text


def test_the_card_shows_findings_settings_and_versions(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    card = ModelCard.load(finished / "cwdpo" / "README.md")
    assert metrics["findings"]
    for finding in metrics["findings"]:
        assert f"- {finding['name']} (stage {finding['stage']}, step 2): {finding['evidence']}. " in card.text
    settings = yaml.safe_load(section(card, "Settings").strip("`").removeprefix("yaml"))
    assert settings["dpo"]["max_steps"] == 2
    assert "output_dir" not in settings
    assert "secret" not in card.content
    made = section(card, "Made with")
    for value in (*metrics["environment"].values(), *metrics["data"].values()):
        assert f"| {value} |" in made


def test_the_card_names_a_base_model_on_the_hub_and_an_adapter():
    metrics = {"after_cwdpo": {"probes": {"chosen_delta_logp": 0.5}}, "findings": [], "environment": {}}
    card = make_card("dpo", "mine", metrics, Origin("owner/name", {}, {}), adapter=True)
    data = ModelCard(str(card)).data
    assert (data.base_model, data.library_name) == ("owner/name", "peft")
    assert "lora" in data.tags
    assert section(card, "What the doctor found") == "Nothing."


def test_push_to_hub_uploads_our_card(settings, write_config, monkeypatch):
    sent = {}

    class Hub:
        def create_repo(self, name, **options):
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, repo_id, folder_path, **options):
            files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()}
            sent[repo_id] = files

    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    del settings["sft"]
    settings["dpo"] |= {"push_to_hub": True, "hub_strategy": "end", "hub_token": "hf_secret", "hub_model_id": "squares"}
    assert main(["run", str(write_config(settings))]) == 0
    files = sent["me/squares"]
    assert "model.safetensors" in files
    card = ModelCard(files["README.md"].decode())
    metrics = json.loads((Path(settings["output_dir"]) / "metrics.json").read_text())
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert card.data.model_name == "squares"
    assert results["chosen_logp"] == metrics["after_cwdpo"]["probes"]["chosen_logp"]
    assert "secret" not in card.content
    assert files["dynamics.png"].startswith(b"\x89PNG")
