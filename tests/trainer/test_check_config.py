"""`cwdpo check CONFIG` finds each mistake planted in a valid run, names it and finds nothing else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from cwdpo_trainer.cli import main
from cwdpo_trainer.preflight.dry_run import dry_run
from cwdpo_trainer.preflight.report import histogram
from cwdpo_trainer.preflight.run_rules import ERROR, WARNING, Problem

# Renders the prompt differently when an answer follows, like templates that strip earlier turns.
REWRITES = (
    "{% for message in messages %}{{ messages | length }} {% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}{% endfor %}"
)


class Case:
    """A valid run in a folder of its own. Tests may change its parts."""

    def __init__(self, folder: Path, task: Path, settings: dict, write_config: Callable[[dict], Path]) -> None:
        self.folder, self.settings, self.write_config = folder, settings, write_config
        for name in ("images", "model"):
            shutil.copytree(task / name, folder / name)
        self.train = [json.loads(line) for line in (task / "train.jsonl").read_text().splitlines()]
        heldout = [json.loads(line) for line in (task / "heldout.jsonl").read_text().splitlines()]
        self.heldout = [{**row, "prompt": row["prompt"] + " the square"} for row in heldout]  # not in train
        settings["model"] = {"path": "model"}
        settings["data"] = {"train": "train.jsonl", "heldout": "heldout.jsonl"}

    def save(self) -> Path:
        for name in ("train", "heldout"):
            lines = (row if isinstance(row, str) else json.dumps(row) for row in getattr(self, name))
            (self.folder / f"{name}.jsonl").write_text("\n".join(lines))
        return self.write_config(self.settings)

    def problems(self, *overrides: str) -> list[Problem]:
        _, problems = dry_run(self.save(), overrides, rows=100)
        return problems

    def change(self, index: int, **columns: object) -> None:
        self.train[index] = self.train[index] | columns

    def processor(self, **changes: object) -> LlavaProcessor:
        return LlavaProcessor.from_pretrained(self.folder / "model", **changes)


@pytest.fixture
def case(tmp_path, task, settings, write_config) -> Case:
    return Case(tmp_path, task, settings, write_config)


def test_a_valid_run_has_no_problems_and_nothing_is_written(case, capsys):
    assert main(["check", str(case.save())]) == 0
    out = capsys.readouterr().out
    assert "data.train: train.jsonl (32 of 32 rows checked, 32 valid)" in out
    assert "tokens, whole pair (prompt, images, longer answer): 9 to 11, median 11" in out
    assert "tokens, images: all 4" in out
    assert "LlavaForConditionalGeneration: 16,864 parameters in float32, head 17 x 32" in out
    assert "memory of the head in one step of stage sft: " in out
    assert "self-test: LlavaForConditionalGeneration: head 17 x 32, float32" in out
    assert f"log-probs of {case.folder}/train.jsonl:1 agree within" in out
    line = r"negative filtering: dpo.drop_below -\d+.\d\d \(nats per token\) leaves out \d+ of the first 32 pairs "
    assert re.search(line, out)
    assert out.endswith("\n0 errors, 0 warnings\n")
    assert not Path(case.settings["output_dir"]).exists()


@pytest.mark.parametrize("with_sft", [True, False])
def test_a_filter_that_leaves_out_every_pair(case, capsys, with_sft):
    if not with_sft:
        del case.settings["sft"]
    case.settings["dpo"]["drop_below"] = 0.0
    assert main(["check", str(case.save())]) == 0
    out = capsys.readouterr().out
    when = " before stage 1" if with_sft else ""
    assert f"warning nothing_kept: dpo.drop_below leaves 0 of 32 pairs in the loss{when}\n  -> lower dpo." in out
    assert out.endswith("\n0 errors, 1 warning\n")


def test_equal_negatives_are_no_error_if_only_logp_floor_is_measured(case, capsys):
    for row in case.train:
        row |= {"prompt": "<image>", "rejected": "blue", "images": case.train[0]["images"]}
    case.settings["dpo"] |= {"logp_floor": "auto", "tau": 0.5}
    main(["check", str(case.save())])
    out = capsys.readouterr().out
    assert "leaves out 0 of the first 32 pairs" in out
    assert "error self_test" not in out


def test_memory_is_predicted_for_trimmed_rows(case, capsys):
    case.settings["data"]["max_length"] = 9  # prompts have 5 tokens, answers 4 or 6
    assert main(["check", str(case.save())]) == 0
    assert "for the 4 longest pairs: 8 sequences of 9 tokens, 32 of them labeled" in capsys.readouterr().out


Plant = Callable[[Case], None]


def unknown_keys(case: Case) -> None:
    case.settings["dpo"] |= {"bta": 0.1}
    case.settings["sft"] |= {"learning_rat": 0.1}


def zero_batch_size(case: Case) -> None:
    case.settings["dpo"]["per_device_train_batch_size"] = 0


def float16_dtype(case: Case) -> None:
    case.settings["model"]["dtype"] = "float16"


def saved_in_float16(case: Case) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(case.folder / "model")
    model.half().save_pretrained(case.folder / "model")


def huge_learning_rate(case: Case) -> None:
    case.settings["dpo"]["learning_rate"] = 5


def huge_beta(case: Case) -> None:
    case.settings["dpo"]["beta"] = 50


def misspelled_metric(case: Case) -> None:
    case.settings["dpo"]["metric_for_best_model"] = "chosen_mean_logps"


def folder_of_another_run_given(case: Case) -> None:
    case.settings["output_dir"] = str(case.folder / "other")
    (case.folder / "other" / "checkpoints" / "sft" / "checkpoint-2").mkdir(parents=True)
    (case.folder / "other" / "run.json").write_text('{"config": {"seed": 3}, "inputs": {}}')


def few_new_tokens(case: Case) -> None:
    case.settings["sampling"]["max_new_tokens"] = 3


def missing_image(case: Case) -> None:
    case.change(2, images=["images/gone.png"])
    case.change(5, images=["images/gone.png"])


def unknown_column(case: Case) -> None:
    case.change(2, chosne="a")


def same_answers(case: Case) -> None:
    case.change(3, rejected=case.train[3]["chosen"])


def broken_line(case: Case) -> None:
    case.train[4] = "{oops"


def more_placeholders_than_images(case: Case) -> None:
    case.change(1, prompt="<image> <image> describe")
    case.change(6, prompt="describe")


def template_rewrites_the_prompt(case: Case) -> None:
    processor = case.processor()
    processor.chat_template = REWRITES
    processor.save_pretrained(case.folder / "model")
    as_messages(case)


def no_template(case: Case) -> None:
    as_messages(case)


def as_messages(case: Case) -> None:
    for rows in (case.train, case.heldout):
        rows[:] = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]


def end_in_answer(case: Case) -> None:
    case.change(0, chosen="a red </s> square")


def image_in_answer(case: Case) -> None:
    case.change(0, rejected="a <image> square")


def unknown_words(case: Case) -> None:
    case.change(0, chosen="a cat", rejected="a dog")


def truncated_image(case: Case) -> None:
    path = case.folder / case.train[7]["images"][0]
    Image.effect_noise((64, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[:2000])  # the header is complete


def html_instead_of_image(case: Case) -> None:
    (case.folder / case.train[7]["images"][0]).write_text("<html>not found</html>")


def long_answer(case: Case) -> None:
    case.change(8, chosen="a " * 70)


def low_limit(case: Case) -> None:
    case.settings["data"]["max_length"] = 10


def too_low_limit(case: Case) -> None:
    case.settings["data"] |= {"max_length": 4, "over_length": "skip"}


def heldout_row_in_train(case: Case) -> None:
    shutil.copy(case.folder / case.heldout[3]["images"][0], case.folder / "copy.png")
    case.train.append({**case.heldout[3], "images": ["copy.png"]})


def duplicated_pair(case: Case) -> None:
    shutil.copy(case.folder / case.train[9]["images"][0], case.folder / "copy.png")
    case.train.append({**case.train[9], "images": ["copy.png"]})


def swapped_answers(case: Case) -> None:
    row = case.train[10]
    case.change(10, chosen=row["rejected"], rejected=row["chosen"])


def no_padding(case: Case) -> None:
    processor = case.processor()
    processor.tokenizer.pad_token = None
    processor.save_pretrained(case.folder / "model")


def padding_with_images(case: Case) -> None:
    processor = case.processor()
    processor.tokenizer.pad_token = "<image>"
    processor.save_pretrained(case.folder / "model")


def grown_tokenizer(case: Case) -> None:
    processor = case.processor()
    processor.tokenizer.add_tokens(["purple"])
    processor.save_pretrained(case.folder / "model")


def long_chosen(case: Case) -> None:
    for row in case.train + case.heldout:
        row["rejected"] = "blue"


def no_model(case: Case) -> None:
    case.settings["model"]["path"] = "./gone"


def no_data(case: Case) -> None:
    case.settings["data"]["heldout"] = "gone.jsonl"


PLANTED: list[tuple[Plant, str, str, list[str]]] = [
    (unknown_keys, ERROR, "config", ["dpo.bta: expected a known key", "mean 'beta'", "sft.learning_rat: "]),
    (zero_batch_size, ERROR, "config", ["dpo.per_device_train_batch_size: expected an integer >= 1, got 0"]),
    (float16_dtype, ERROR, "float16_weights", ["in float16 (model.dtype)"]),
    (saved_in_float16, ERROR, "float16_weights", ["in float16 (the dtype of the saved model)"]),
    (huge_learning_rate, WARNING, "learning_rate", ["dpo.learning_rate is 5, not in"]),
    (huge_beta, WARNING, "beta", ["dpo.beta is 50, not in [0.01, 1]"]),
    (misspelled_metric, ERROR, "unknown_metric", ["dpo.metric_for_best_model", "did you mean 'chosen_mean_logp'"]),
    (folder_of_another_run_given, ERROR, "folder_of_another_run", ["as this run was started with"]),
    (few_new_tokens, WARNING, "short_samples", ["max_new_tokens is 3, and 44 of 44 chosen answers are longer"]),
    (missing_image, ERROR, "invalid_rows", ["2 of 32 rows of data.train: images: expected an existing file",
                                             "data: URI:\n", "jsonl:3: got ", "jsonl:6: ", "images/gone.png"]),
    (unknown_column, ERROR, "invalid_rows", ["1 of 32 rows of data.train:\n", "jsonl:3: unknown column chosne (known"]),
    (same_answers, ERROR, "invalid_rows", ["rejected: expected an answer that differs from chosen", "jsonl:4: got 'a"]),
    (broken_line, ERROR, "invalid_rows", ["expected valid JSON", "train.jsonl:5: got Expecting"]),
    (more_placeholders_than_images, ERROR, "placeholder_count",
     ["2 of 32 rows", "train.jsonl:2: 2 <image> in the prompt, 1 images", "train.jsonl:7: 0 <image>"]),
    (template_rewrites_the_prompt, ERROR, "template_changes_prompt",
     ["32 of 32 rows", "and 27 more", "train.jsonl:1: expected prompt and answer to start with"]),
    (no_template, ERROR, "processor_error",
     ["32 of 32 rows", "train.jsonl:1: chat template: expected a template that renders the", "got ValueError: "]),
    (end_in_answer, ERROR, "special_token_in_answer", ["train.jsonl:1: </s> in chosen 'a red </s> square'"]),
    (image_in_answer, ERROR, "special_token_in_answer", ["train.jsonl:1: <image> in rejected 'a <image> square'"]),
    (unknown_words, ERROR, "same_tokens", ["train.jsonl:1: chosen and rejected are the same 3 tokens: a <unk> </s>"]),
    (truncated_image, ERROR, "unreadable_image", ["1 of 32 rows of data.train", "train.jsonl:8: ", "truncated"]),
    (html_instead_of_image, ERROR, "unreadable_image", ["train.jsonl:8: ", "cannot identify image file"]),
    (long_answer, ERROR, "exceeds_model_positions", ["1 rows are longer than", "train.jsonl:9 (76)"]),
    (low_limit, WARNING, "longer_than_max_length", ["data.train, max_length 10: 16 of 32 rows have trimmed answers"]),
    (too_low_limit, ERROR, "max_length", ["expected room for at least 1 row (data.over_length: skip), got 4"]),
    (heldout_row_in_train, ERROR, "heldout_pairs_in_train", ["1 pairs", "heldout.jsonl:4 = ", "train.jsonl:33"]),
    (duplicated_pair, WARNING, "duplicate_pairs", ["1 pairs of data.train", "train.jsonl:33"]),
    (swapped_answers, ERROR, "rejected_is_a_reference", ["among the references in 1 rows", "train.jsonl:11"]),
    (no_padding, ERROR, "processor", ["tokenizer.pad_token_id: expected a token id, got None"]),
    (padding_with_images, ERROR, "pad_token_is_image_token", ["the pad token '<image>' is an image token"]),
    (grown_tokenizer, ERROR, "tokens_without_embedding", ["has 18 tokens, the model has embeddings for 17"]),
    (long_chosen, WARNING, "length_bias", ["longer in 44 of 44 pairs and have 2.0 times as many tokens"]),
    (no_model, ERROR, "model_path", ["model.path: expected an existing folder, got "]),
    (no_data, ERROR, "heldout", ["gone.jsonl: no such file"]),
]  # fmt: skip


@pytest.mark.parametrize(("plant", "severity", "name", "evidence"), PLANTED, ids=[row[0].__name__ for row in PLANTED])
def test_only_the_planted_mistake_is_reported(case, plant, severity, name, evidence):
    plant(case)
    problems = case.problems()
    assert {(problem.severity, problem.name) for problem in problems} == {(severity, name)}
    text = "\n".join(problem.evidence for problem in problems)
    assert [piece for piece in evidence if piece not in text] == []
    assert all(problem.advice for problem in problems)


def test_all_mistakes_are_reported_at_once_with_exit_status_1(case, capsys):
    plants = [
        unknown_keys,
        zero_batch_size,
        missing_image,
        end_in_answer,
        swapped_answers,
        huge_beta,
        duplicated_pair,
    ]
    for plant in plants:
        plant(case)
    assert main(["check", str(case.save()), "--no-model"]) == 1
    out = capsys.readouterr().out
    names = [line.split(":")[0] for line in out.splitlines() if line.startswith(("error ", "warning "))]
    assert names == [
        "error config", "error config", "error config", "error invalid_rows", "error special_token_in_answer",
        "error rejected_is_a_reference", "warning beta", "warning duplicate_pairs",
    ]  # fmt: skip
    assert out.endswith("6 errors, 2 warnings\n")


@pytest.mark.parametrize("metric", ["near_cooling", "eval_onpolicy_tv", "chosen_ece"])
def test_every_probe_metric_is_accepted(case, metric):
    assert case.problems(f"dpo.metric_for_best_model={metric}") == []


def test_a_missing_dependency_of_the_processor_is_named(case, monkeypatch):
    def load(path, **options):
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library")

    monkeypatch.setattr("cwdpo_trainer.models.loading.AutoProcessor.from_pretrained", load)
    (problem,) = case.problems()
    assert problem.name == "processor"
    assert "requires the Torchvision library" in problem.evidence


def test_warnings_alone_exit_with_0(case, capsys):
    assert main(["check", str(case.save()), "dpo.beta=50", "--no-model"]) == 0
    assert "warning beta: dpo.beta is 50" in capsys.readouterr().out


def test_an_invalid_dataset_does_not_hide_mistakes_in_the_other(case):
    case.train = ["{oops", "[]"]
    swap = case.heldout[0]
    case.heldout[0] = {**swap, "chosen": swap["rejected"], "rejected": swap["chosen"]}
    names = [problem.name for problem in case.problems()]
    assert names == ["invalid_rows", "invalid_rows", "train", "rejected_is_a_reference"]


def test_the_data_is_checked_without_a_model(case):
    no_model(case)
    swapped_answers(case)
    assert {problem.name for problem in case.problems()} == {"model_path", "rejected_is_a_reference"}


@pytest.mark.parametrize("override", ["model=null", "data.train=3", "nonsense"])
def test_an_unusable_config_is_reported(case, capsys, override):
    assert main(["check", str(case.save()), override]) == 1
    assert "error config: " in capsys.readouterr().out


def test_an_invalid_section_prepare_is_one_problem(case):
    (problem,) = case.problems("prepare=3")
    assert (problem.name, "prepare: expected a mapping, got 3 (int)" in problem.evidence) == ("config", True)


@pytest.mark.parametrize("function", ["shutil:rmtree", "planted:main", "cwdpo_trainer.recipes.digits:prepare"])
def test_a_check_neither_imports_nor_calls_what_a_config_names(case, function, monkeypatch, capsys):
    (case.folder / "planted.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(case.folder)
    case.settings["prepare"] = {"function": function, "folder": str(case.folder)}
    before = sorted(case.save().parent.rglob("*"))
    assert main(["check", str(case.save()), "--no-model"]) == 0
    assert sorted(case.folder.rglob("*")) == before
    printed = capsys.readouterr().out
    assert f"warning prepare: skipped the call {function}('{case.folder}'): check does not execute" in printed
    assert "  -> if it makes files that are missing: cwdpo check CONFIG --prepare" in printed


def test_a_check_calls_the_function_if_told_to(case):
    case.settings["prepare"] = {"function": "pathlib:Path.mkdir", "folder": str(case.folder / "made")}
    (problem,) = case.problems()
    assert "prepare.function: expected the name of a function, as package.module:function" in problem.evidence
    case.settings["prepare"] = {"function": "os:makedirs", "folder": str(case.folder / "made")}
    case.settings["model"]["path"] = str(case.folder / "model")  # a relative path would start at the made folder
    case.settings["data"] = {name: str(case.folder / f"{name}.jsonl") for name in ("train", "heldout")}
    main(["check", str(case.save()), "--no-model", "--prepare"])
    assert (case.folder / "made").is_dir()


@pytest.mark.parametrize("file", ["config.json", "processor_config.json"])
def test_code_that_came_with_a_model_is_refused(case, file, monkeypatch):
    """Nothing is run, and nobody is asked."""
    path, name = (
        case.folder / "model" / file,
        {"config.json": "AutoConfig", "processor_config.json": "AutoProcessor"}[file],
    )
    (case.folder / "model" / "planted.py").write_text(f"open({str(case.folder / 'ran')!r}, 'w')\n")
    settings = json.loads(path.read_text()) | {"auto_map": {name: "planted.Planted"}}
    settings |= {"model_type": "planted"} if file == "config.json" else {"processor_class": "Planted"}
    path.write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    assert any(problem.severity == ERROR for problem in case.problems())
    assert not (case.folder / "ran").exists()


def test_skipped_rows_are_a_warning(case):
    broken_line(case)
    (problem,) = case.problems("data.skip_bad_rows=true")
    assert (problem.severity, problem.name) == (WARNING, "invalid_rows")


def test_max_length_can_keep_rows_within_the_positions(case):
    long_answer(case)
    problems = case.problems("data.max_length=64")
    assert [problem.name for problem in problems] == ["longer_than_max_length"]


def test_the_self_test_finds_the_processor_of_another_model(case, capsys):
    """It makes more tokens per image than the model has features."""
    case.processor(patch_size=2).save_pretrained(case.folder / "model")
    assert main(["check", str(case.save())]) == 1
    assert "error self_test: ValueError: Image features and image tokens do not match" in capsys.readouterr().out


def test_the_sample_is_evenly_spaced(case):
    preview, _ = dry_run(case.save(), ["data.max_length=10"], rows=10)
    assert [row.id for row in preview.sample["train"]] == [0, 4, 8, 12, 16, 20, 24, 28]
    assert len(preview.fits["train"].rows) == 8


def test_unused_columns_are_named(case, capsys):
    rows = [{**row, "images": [str(case.folder / row["images"][0])], "model": "x"} for row in case.train]
    Dataset.from_list(rows).save_to_disk(case.folder / "set")
    assert main(["check", str(case.save()), "data.train=set", "--no-model"]) == 0
    assert "unused columns: model" in capsys.readouterr().out


def test_histogram_bins():
    lines = histogram("tokens", [1, 1, 2, 17, 30])
    assert lines[0] == "  tokens: 1 to 30, median 2"
    assert [line.split() for line in lines[1:]] == [
        ["1", "-", "4", "#" * 40, "3"], ["5", "-", "8", "0"], ["9", "-", "12", "0"], ["13", "-", "16", "0"],
        ["17", "-", "20", "#" * 14, "1"], ["21", "-", "24", "0"], ["25", "-", "28", "0"],
        ["29", "-", "30", "#" * 14, "1"],
    ]  # fmt: skip
    assert histogram("tokens", [3, 3]) == ["  tokens: all 3"]
