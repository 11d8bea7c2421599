"""`curriculum: hardest_first`: the order of the pairs, which a resumed stage keeps."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch

from cwdpo_kernels import Cooling, cooling_weight
from cwdpo_trainer.config.arguments import ProbeArguments, SamplingArguments
from cwdpo_trainer.config.stage_arguments import DPOArguments
from cwdpo_trainer.data.collator import with_answers
from cwdpo_trainer.errors import InputError
from cwdpo_trainer.evaluation.probes import Probes
from cwdpo_trainer.stages.curriculum import ORDER_FILE, hardest_first, in_row_order, share_of
from cwdpo_trainer.stages.dpo import CWDPOTrainer


@pytest.fixture
def make(model, collator, rows, tmp_path):
    """A stage 2 trainer on all rows; `seen` records the rows of each batch."""

    def make(**options):
        sampling = SamplingArguments(max_new_tokens=5)
        probes = Probes(rows, collator, ProbeArguments(rows=4), sampling, Cooling(), seed=0)
        args = DPOArguments(
            output_dir=str(tmp_path / "stage"), max_steps=10, per_device_train_batch_size=4, eval_strategy="no",
            eval_on_start=False, save_steps=3, save_total_limit=9, disable_tqdm=True, **options,
        )  # fmt: skip
        policy = copy.deepcopy(model)
        trainer = CWDPOTrainer(policy, copy.deepcopy(policy), args, rows, collator, probes, sampling=sampling)
        trainer.seen = []
        plain = trainer.training_step
        trainer.training_step = lambda model, inputs, *rest: (
            trainer.seen.append(inputs["rows"]) or plain(model, inputs, *rest)
        )
        return trainer

    return make


@torch.no_grad()
def weights_by_hand(model, collator, rows, cooling):
    """w_c of every row's negative, computed from full logits."""
    model.eval()
    pairs = collator(rows)
    batch = with_answers(pairs["prompts"], pairs["rejected"], pad_id=0)
    logp = model(**batch.inputs).logits.double().log_softmax(-1)
    mask = batch.labels >= 0
    logp = logp.gather(-1, batch.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * mask
    return cooling_weight(logp.sum(-1) / mask.sum(-1), cooling)


@pytest.mark.parametrize("cooling", ["adaptive", "off"])
def test_pairs_are_ordered_by_cooling_weight(make, model, collator, rows, cooling):
    trainer = make(curriculum="hardest_first", cooling=cooling, logp_floor=-5.0, tau=3.0, onpolicy_fraction=0.5)
    trainer.train()
    seen = [row for batch in trainer.seen for row in batch]
    weights = weights_by_hand(model, collator, rows, Cooling(-5.0, 3.0))
    in_order = [weights[row].item() for row in seen]
    assert sorted(seen[:32]) == list(range(32))  # the first epoch sees every pair once
    assert all(before >= after - 1e-6 for before, after in pairwise(in_order[:32]))
    assert in_order[0] > in_order[31] + 0.1
    assert seen[32:] == seen[:8]  # the second epoch has the same order
    assert seen[:32] != list(range(32))


def test_without_a_curriculum_the_order_is_random(make):
    trainer = make()
    trainer.train()
    assert trainer.order is None
    seen = [row for batch in trainer.seen for row in batch]
    assert seen[32:] != seen[:8]


def test_a_resumed_stage_keeps_the_order_and_the_trajectory(make, tmp_path, monkeypatch):
    uninterrupted = make(curriculum="hardest_first")
    uninterrupted.train()
    monkeypatch.setattr(CWDPOTrainer, "_rejected_mean_logp", None)  # a resumed stage must not measure again
    resumed = make(curriculum="hardest_first")
    resumed.train(resume_from_checkpoint=str(tmp_path / "stage" / "checkpoint-3"))
    assert resumed.seen == uninterrupted.seen[3:]
    for name, value in uninterrupted.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_a_checkpoint_of_other_rows_is_refused(make, tmp_path):
    make(curriculum="hardest_first").train()
    folder = tmp_path / "stage" / "checkpoint-3"
    (folder / ORDER_FILE).write_text("[1, 0]")
    with pytest.raises(InputError, match="expected an order of 32 rows, got 2"):
        make(curriculum="hardest_first").train(resume_from_checkpoint=str(folder))
    (folder / ORDER_FILE).unlink()
    with pytest.raises(InputError, match=r"expected a checkpoint with curriculum.json, got one without"):
        make(curriculum="hardest_first").train(resume_from_checkpoint=str(folder))


def test_ties_keep_the_order_of_the_data():
    assert hardest_first(torch.tensor([-3.0, -1.0, -2.0, -1.0, -3.0])) == [1, 3, 2, 0, 4]


@pytest.mark.parametrize(("count", "ranks"), [(7, 1), (7, 2), (7, 3), (6, 3), (2, 4)])
def test_shares_of_all_processes_cover_the_rows(count, ranks):
    rows = list(range(count))
    shares = [share_of(rows, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert in_row_order(torch.tensor(shares).flatten(), count, ranks).tolist() == rows


def test_an_unknown_curriculum_is_refused(tmp_path):
    with pytest.raises(ValueError, match="curriculum: expected null or hardest_first, got 'easiest'"):
        DPOArguments(output_dir=str(tmp_path), curriculum="easiest")
