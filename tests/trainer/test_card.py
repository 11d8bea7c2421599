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
from cwdpo_trainer.config.sections import without_secrets
from cwdpo_trainer.errors import shorten
from cwdpo_trainer.evaluation.card import Origin, make_card
from cwdpo_trainer.evaluation.summary import NOTE, table


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
    head = [cell.strip("| ") for cell in section(card, "Metrics on held-out rows").splitlines()[0].split(" | ")]
    assert head == ["", "n", "start", "after SFT", "after CW-DPO"][: 4 + (name == "cwdpo")]
    counts = {row[0].strip("| "): row[1] for row in rows}
    assert counts["log p, chosen (nats per answer)"] == counts["ECE, chosen"] == "40 answers"
    assert counts["log p, near (nats per answer)"] == "20 answers"
    assert counts["CIDEr of captions (x 100)"] == "12 captions"
    assert all(n.split()[0].isdigit() for title, n in counts.items() if title not in ("", "---"))
    assert all(", n = " in result.metric_name for result in card.data.eval_results)
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


HOSTILE = "a|b\n---\n# <script>x</script> [y](javascript:z) `q` **w** \x1b[2J \ud800 ``` $e$ _i_"


def hostile_card(monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice")
    settings = {
        "output_dir": "/secret/run",
        "model": {"path": "/home/alice/models/m"},
        "prepare": {"text": "```\n# broken out <b>\n````\n~~~", "api_key": "sk-1", "list": [{"hub_token": "t1"}]},
        "data": {"train": "https://me:pw1@host/x?token=t2&a=1", "heldout": "hf_" + "k" * 34},
    }
    metrics = {
        "after_cwdpo": {"probes": {"chosen_delta_logp": 0.5}},
        "findings": [{"name": "n", "stage": "dpo", "step": 1, "evidence": "a <img src=x>\n# b", "advice": "c"}],
        "environment": {"device": "c|p<u>\nx"},
    }
    return make_card("dpo", HOSTILE, metrics, Origin(HOSTILE, settings, {"train": "`1|2`"}), adapter=False)


def test_titles_settings_and_tables_are_escaped(monkeypatch, tmp_path):
    card = hostile_card(monkeypatch)
    path = tmp_path / "README.md"
    path.write_text(str(card), encoding="utf-8")
    again = ModelCard.load(path)
    assert again.data.model_name == again.data.base_model == shorten(HOSTILE)
    assert [line for line in again.text.splitlines() if line.startswith("#")] == [
        r"# a\|b --- # \<script\>x\</script\> \[y\](javascript:z) \`q\` \*\*w\*\* \\x1b\[2J "
        r"\\ud800 \`\`\` \$e\$ \_i\_",
        "## Metrics on held-out rows", "## What the doctor found", "## Settings", "## Made with",
    ]  # fmt: skip
    assert "Fine-tuned from ```` a|b --- # <script>" in again.text
    settings = section(again, "Settings")
    fence = "`" * 5
    assert settings.startswith(f"{fence}yaml\n")
    assert settings.endswith(f"\n{fence}")
    assert yaml.safe_load(settings.strip("`").removeprefix("yaml"))["prepare"]["text"].startswith("```\n# broken out")
    assert "- n (stage dpo, step 1): a &lt;img src=x> # b. " in again.text
    made = section(again, "Made with").splitlines()
    assert made[2:] == [r"| device | c\|p\<u\> x |", r"| data.train (digest) | \`1\|2\` |"]


def test_cards_contain_no_secrets(monkeypatch):
    card = hostile_card(monkeypatch)
    settings = yaml.safe_load(section(card, "Settings").strip("`").removeprefix("yaml"))
    assert settings["model"]["path"] == "~/models/m"
    assert settings["data"] == {"train": "https://***@host/x?token=***&a=1", "heldout": "hf_***"}
    assert settings["prepare"].keys() == {"text", "list"}
    assert settings["prepare"]["list"] == [{}]
    assert not [secret for secret in ("alice", "sk-1", "t1", "pw1", "t2", "kkk", "/secret") if secret in str(card)]


NAMES = [
    "token", "hub_token", "HF_TOKEN", "api_key", "apiKey", "x-api-key", "OPENAI_API_KEY", "accessToken", "clientSecret",
    "secret_key", "aws_secret_access_key", "password", "passwd", "passphrase", "private-key", "credentials",
    "Authorization", "Cookie", "wandb api key", "account_key",
]  # fmt: skip
TEXTS = {
    "hf_" + "K" * 34: "hf_***", "sk-proj-" + "K" * 40: "sk-***", "sk-ant-api03-" + "K" * 40: "sk-***",
    "ghp_" + "K" * 36: "ghp_***", "gho_" + "K" * 36: "gho_***", "github_pat_" + "K" * 40: "github_pat_***",
    "glpat-" + "K" * 20: "glpat-***", "xoxb-1-2-" + "K" * 24: "xoxb-***", "AKIA" + "K" * 16: "AKIA***",
    "AIza" + "K" * 35: "AIza***", "eyJhbGciOi.eyJzdWIi." + "K" * 43: "eyJ***",
    "Bearer " + "K" * 20: "Bearer ***", "Authorization: Bearer " + "K" * 20: "Authorization: ***",
    "authorization=Basic KKK": "authorization=***",
    "https://user:KKK@host/x": "https://***@host/x", "https://KKK@host/x": "https://***@host/x",
    "s3://b/x?X-Amz-Signature=KKK&y=1": "s3://b/x?X-Amz-Signature=***&y=1",
    "https://h/x?sig=KKK#top": "https://h/x?sig=***#top", "run --hub-token=KKK now": "run --hub-token=*** now",
    "export HF_TOKEN=KKK": "export HF_TOKEN=***", "password: KKK": "password: ***",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_options_with_a_secret_name_are_left_out(name):
    assert without_secrets({"prepare": {name: "KKK", "list": [{name: 1}], "kept": 1}}) == {
        "prepare": {"list": [{}], "kept": 1}
    }


@pytest.mark.parametrize("text", TEXTS)
def test_secrets_in_texts_are_hidden(text):
    hidden = without_secrets({"prepare": {"folder": text, "list": [f"see {text}"]}})["prepare"]
    assert hidden == {"folder": TEXTS[text], "list": [f"see {TEXTS[text]}"]}


def test_names_that_look_like_secrets_only(monkeypatch):
    settings = {"sampling": {"max_new_tokens": 6}, "dpo": {"average_tokens_across_devices": True, "hub_token": "x"},
                "data": {"train": "a@b/c.jsonl", "heldout": "hf_data/x"}, "prepare": {"monkey": 1, "tokenizer": "x",
                "key": "k", "pad_tokens": 2, "text": "Basic visualizations: eyJack, the token of love"}}  # fmt: skip
    kept = without_secrets(settings)
    assert kept == {**settings, "dpo": {"average_tokens_across_devices": True}}


def two_stages(n: int) -> dict:
    """Metrics of a run of both stages with `n` chosen answers, as in metrics.json."""
    probes = {f"{name}_{key}": 0.5 for name in ("chosen", "near", "onpolicy") for key in ("logp", "delta_logp")}
    answers = {"chosen": n, "near": n}
    return {
        "start": {"cider": 1.0, "captions": 7, "probes": probes, "answers": answers | {"onpolicy": 31}},
        "after_sft": {"cider": 1.0, "captions": 7, "probes": probes, "answers": answers | {"onpolicy": 31}},
        "after_cwdpo": {
            "cider": 1.0, "captions": 7, "probes": probes, "answers": answers | {"onpolicy": 32},
            "pairs_left_out": 0.2, "pairs_left_out_steps": 6, "weights_moved": 0.3, "trained_weights": 99,
        },
        "findings": [],
        "environment": {},
    }  # fmt: skip


def test_no_line_compares_on_policy_answers_of_two_stages():
    lines = {line.title: line for line in table(two_stages(40))}
    for key in ("log p", "Δ log p"):
        first, second = (lines[f"{key}, onpolicy of stage {stage} (nats per answer)"] for stage in (1, 2))
        assert first.values == {"start": 0.5, "after_sft": 0.5, "after_cwdpo": None}
        assert second.values == {"start": None, "after_sft": None, "after_cwdpo": 0.5}
        assert (first.n, second.n) == ("31 answers", "32 answers")
    assert lines["log p, near (nats per answer)"].values == {"start": 0.5, "after_sft": 0.5, "after_cwdpo": 0.5}
    assert "no line compares answers of one stage with those of another" in NOTE
    only_dpo = {label: entry for label, entry in two_stages(40).items() if label != "after_sft"}
    (line,) = [line for line in table(only_dpo) if line.title.startswith("log p, onpolicy")]
    assert line.title == "log p, onpolicy of stage 2 (nats per answer)"
    assert line.values == {"start": 0.5, "after_cwdpo": 0.5}


def test_every_line_says_n():
    counts = {line.key: line.n for line in table(two_stages(40))}
    assert counts["cider"] == "7 captions"
    assert counts["chosen_logp"] == "40 answers"
    assert counts["pairs_left_out"] == "6 steps"
    assert counts["weights_moved"] == "99 weights"
    earlier = {"after_cwdpo": {"probes": {"chosen_delta_logp": 0.5}}}  # of a version that did not count
    assert [line.n for line in table(earlier)] == ["-"]


def test_the_card_says_that_there_are_too_few_answers():
    origin = Origin("owner/name", {}, {})
    card = make_card("dpo", "mine", two_stages(6), origin, adapter=False)
    few = "n = 6 answers are too few for a diagnosis (20 needed)"
    assert section(ModelCard(str(card)), "What the doctor found") == f"- stage sft: {few}\n- stage dpo: {few}"
    card = make_card("sft", "mine", two_stages(6), origin, adapter=False)
    assert section(ModelCard(str(card)), "What the doctor found") == f"- stage sft: {few}"
    card = make_card("dpo", "mine", two_stages(40), origin, adapter=False)
    assert section(ModelCard(str(card)), "What the doctor found") == "Nothing."
