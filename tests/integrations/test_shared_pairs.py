"""The trees of padded preference pairs: which tokens a pair shares, and what predicts which label."""

import pytest
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from cwdpo_kernels import IGNORE_INDEX
from cwdpo_kernels.integrations.shared_pairs import PairsDiffer, tree_of_pairs

PAIRS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [9, 10, 11]},
]


def tree(rows, **entries):
    inputs = {**rows, **entries}
    return tree_of_pairs(torch.nn.Module(), inputs, inputs.pop("completion_mask"))


def collated(pairs=PAIRS, **options):
    return DataCollatorForPreference(pad_token_id=0, **options)(pairs)


@pytest.fixture(autouse=True)
def _plain_positions(monkeypatch):
    monkeypatch.setattr("cwdpo_kernels.integrations.shared_pairs.rope_index", lambda model, rows: None)


def of_answers(batch):
    """By answer: the tokens that its states have seen, each with its label."""
    found = []
    ids = batch.inputs["input_ids"][0]
    ends = (*batch.tree.starts[1:], batch.tree.tokens)
    for start, stop in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        answer = []
        for state, label in zip(batch.states[start:stop].tolist(), batch.labels[start:stop].tolist(), strict=True):
            segment = next(index for index, end in enumerate(ends) if state < end)
            path = torch.cat([ids[batch.tree.span(each)] for each in batch.tree.path(segment)]).tolist()
            answer.append((path[: batch.inputs["position_ids"][0, state] + 1], label))
        found.append(answer)
    return found


def test_pairs_share_their_prompts():
    batch = tree(collated())
    assert batch.tree.lengths == (3, 1, 0, 2, 0, 2)
    assert batch.tree.parents == (-1, 0, 0, -1, 3, 3)
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3, 4, 7, 8, 9, 10]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.inputs["attention_mask"].tolist() == [[1] * 8]
    assert of_answers(batch) == [
        [([1, 2, 3], 4), ([1, 2, 3, 4], 5)],
        [([7, 8], 9)],
        [([1, 2, 3], 6)],
        [([7, 8], 9), ([7, 8, 9], 10), ([7, 8, 9, 10], 11)],
    ]


def test_padding_on_the_left_changes_nothing():
    rows = collated()
    flipped = {name: value.clone() for name, value in rows.items()}
    for row, count in enumerate(rows["attention_mask"].sum(1).tolist()):
        for value in flipped.values():
            value[row] = value[row].roll(-count)
    assert of_answers(tree(flipped)) == of_answers(tree(rows))


def test_prompts_that_were_cut_differently_have_their_own_trees():
    batch = tree(collated(max_length=3, truncation_mode="keep_end"))
    assert batch.tree.lengths == (1, 1, 2, 0, 2, 0, 1, 1)
    assert batch.tree.parents == (-1, 0, -1, 2, -1, 4, -1, 6)
    assert of_answers(batch) == [
        [([3], 4), ([3, 4], 5)],
        [([7, 8], 9)],
        [([2, 3], 6)],
        [([9], 10), ([9, 10], 11)],  # the prompt is gone, so nothing predicts the first token
    ]


def test_empty_answers_keep_their_place():
    batch = tree(collated([{**PAIRS[0], "chosen_ids": []}, {**PAIRS[1], "rejected_ids": []}]))
    assert batch.cu_seqlens.tolist() == [0, 0, 1, 2, 2]
    assert of_answers(batch) == [[], [([7, 8], 9)], [([1, 2, 3], 6)], []]
    batch = tree(collated(max_length=2))
    assert batch.cu_seqlens.tolist() == [0] * 5
    assert (len(batch.states), len(batch.labels), batch.tree.lengths) == (0, 0, (2, 2))


def test_labels_are_those_of_the_completion_mask():
    """A mask with holes, over a tool's output for example."""
    rows = collated()
    rows["completion_mask"][3, 3] = 0
    assert tree(rows).labels.tolist() == [4, 5, 9, 6, 9, IGNORE_INDEX, 11]


def test_rows_share_no_further_than_their_token_types():
    rows = collated([PAIRS[0]])
    types = torch.zeros_like(rows["input_ids"])
    types[1, 1] = 1
    batch = tree(rows, token_type_ids=types)
    assert batch.tree.lengths == (1, 3, 2)
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 0]]


def test_images_are_taken_once_per_pair():
    images = torch.rand(3, 5)
    assert torch.equal(tree(collated(), pixel_values=images.repeat(2, 1)).inputs["pixel_values"], images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(6, 5), "the rows of a pair have different pixel_values"),
        (torch.rand(3, 5), "pixel_values is not a tensor with the same entries for chosen and rejected rows"),
        ([1, 1], "pixel_values is not a tensor with the same entries for chosen and rejected rows"),
    ],
)
def test_images_that_differ_are_not_shared(images, message):
    with pytest.raises(PairsDiffer, match=message):
        tree(collated(), pixel_values=images)


def test_prompts_with_images_that_differ_are_not_shared():
    rows = collated()
    rows["input_ids"][2, 1] = 9
    with pytest.raises(PairsDiffer, match="the rows of pair 0 have images and different prompts"):
        tree(rows, pixel_values=torch.ones(4, 6))
