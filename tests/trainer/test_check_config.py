"""`cwdpo check CONFIG` finds each mistake planted in a valid run, names it and finds nothing else."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from transformers import LlavaForConditionalGeneration

from cwdpo_trainer.cli import main
from cwdpo_trainer.preflight.run_rules import ERROR, WARNING

sys.path.insert(0, str(Path(__file__).parent))
from check_case import Case

# Renders the prompt differently when an answer follows, like templates that strip earlier turns.
REWRITES = (
    "{% for message in messages %}{{ messages | length }} {% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}{% endfor %}"
)

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


def few_heldout_answers(case: Case) -> None:
    case.settings["dpo"]["stop_on"] = ["drift", "nothing_kept", "squeezing"]


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
    (few_heldout_answers, WARNING, "stop_on_never_stops",
     ["stop_on names drift, squeezing, and the probes have 12 held-out answers"]),
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
    (html_instead_of_image, ERROR, "unreadable_image", ["train.jsonl:8: ", "(not an image)"]),
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
    (no_model, ERROR, "model_path", ["model.path: expected an existing folder or a name on the Hub, got "]),
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


def test_the_data_is_checked_without_a_model(case):
    no_model(case)
    swapped_answers(case)
    assert {problem.name for problem in case.problems()} == {"model_path", "rejected_is_a_reference"}


def test_skipped_rows_are_a_warning(case):
    broken_line(case)
    (problem,) = case.problems("data.skip_bad_rows=true")
    assert (problem.severity, problem.name) == (WARNING, "invalid_rows")


def test_max_length_can_keep_rows_within_the_positions(case):
    long_answer(case)
    problems = case.problems("data.max_length=64")
    assert [problem.name for problem in problems] == ["longer_than_max_length"]
