"""`cwdpo check` says before any training that a run with `prefix_sharing: on` cannot share its prompts."""

from __future__ import annotations

import json

import pytest

from cwdpo_trainer.config.loader import read_config


def change_text_config(case, **changes):
    path = case.folder / "model" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"].update(changes)
    path.write_text(json.dumps(config))


def sharing_problems(case):
    return [problem for problem in case.problems() if problem.name == "prefix_sharing"]


@pytest.mark.parametrize("setting", ["auto", "on"])
def test_a_model_that_can_share(case, setting):
    case.settings["model"]["prefix_sharing"] = setting
    assert sharing_problems(case) == []


def test_dropout_in_the_attention(case):
    case.settings["model"]["prefix_sharing"] = "on"
    change_text_config(case, attention_dropout=0.1)
    (problem,) = sharing_problems(case)
    assert str(problem) == (
        "error prefix_sharing: model.prefix_sharing is on, but LlavaForConditionalGeneration has a dropout of 0.1 in "
        "its attention (attention_dropout)\n  -> set it to auto or off"
    )
    case.settings["model"]["prefix_sharing"] = "auto"
    assert sharing_problems(case) == []


def test_compiled_models(case):
    case.settings["model"]["prefix_sharing"] = "on"
    case.settings["dpo"]["torch_compile"] = True
    (problem,) = sharing_problems(case)
    assert problem.evidence == "model.prefix_sharing is on, but dpo.torch_compile is on"


def test_a_wrong_setting(case):
    case.settings["model"]["prefix_sharing"] = "maybe"
    evidence = [problem.evidence for problem in case.problems() if problem.name == "config"]
    assert any("prefix_sharing" in each and "one of auto, on, off" in each and "maybe" in each for each in evidence), (
        evidence
    )


def test_yaml_reads_on_and_off_as_words(case):
    path = case.save()
    for word in ("on", "off"):
        text = path.read_text().replace("model:\n", f"model:\n  prefix_sharing: {word}\n", 1)
        changed = path.with_name("words.yaml")
        changed.write_text(text)
        for overrides in ([], [f"model.prefix_sharing={word}"]):
            config, mistakes = read_config(changed, overrides)
            assert not mistakes
            assert config.model.prefix_sharing == word
