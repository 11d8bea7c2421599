"""CoolingDPOTrainer with `loss`: TRL's own loss types, and losses without a reference."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from trl import DPOConfig, DPOTrainer

from cwdpo_kernels import Cooling, CoolingWeighted
from cwdpo_kernels.integrations.trl import CoolingDPOTrainer
from cwdpo_kernels.preference import DPO, EXO, IPO, PREFERENCE_LOSSES, Robust, SimPO

sys.path.insert(0, str(Path(__file__).parent))
from dpo_task import BETA, COOLING, first_batch, losses_of, make, moved

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

SAME_NAME = ("sigmoid", "hinge", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")
CASES = {name: (PREFERENCE_LOSSES[name](beta=BETA), name, None) for name in SAME_NAME} | {
    "ipo": (IPO(BETA), "ipo", None),
    "exo_pair": (EXO(BETA, 0.2), "exo_pair", None),
    "robust": (Robust(BETA, 0.2), "robust", None),
    "sigmoid_norm": (DPO(BETA), "sigmoid_norm", "token"),
}


def loss_and_gradient(trainer, batch):
    loss = trainer.compute_loss(trainer.model, batch)
    return loss.item(), torch.autograd.grad(loss, trainer.model.lm_head.weight)[0]


@pytest.mark.parametrize("task", ["text"], indirect=True)
def test_losses_equal_trls(task):
    ours, theirs = (
        make(kind, task, moved(copy.deepcopy(task.model)), ref_model=copy.deepcopy(task.model))
        for kind in (CoolingDPOTrainer, DPOTrainer)
    )
    theirs.label_smoothing = 0.2
    batch = first_batch(ours)
    for name, (loss, loss_type, normalize) in CASES.items():
        ours.loss, ours.normalize = loss, normalize
        theirs.loss_types = [loss_type]
        (found, grad), (expected, their_grad) = (loss_and_gradient(trainer, batch) for trainer in (ours, theirs))
        assert found == pytest.approx(expected, rel=1e-5), name
        torch.testing.assert_close(grad, their_grad, rtol=1e-3, atol=5e-6, msg=name)


def counted(trainer):
    calls, run = [], trainer._reference
    trainer._reference = lambda *args: calls.append(1) or run(*args)
    return calls


@pytest.mark.parametrize("sharing", [False, True])
def test_a_loss_without_a_reference(task, sharing):
    loss = SimPO(1.5, gamma=0.3)
    trainer = make(CoolingDPOTrainer, task, cooling=None, loss=loss, prefix_sharing=sharing,
                   args={"beta": DPOConfig.beta, "max_steps": 2})  # fmt: skip
    calls = counted(trainer)
    batch = first_batch(trainer)
    logits = task.model.eval()(**{k: v for k, v in batch.items() if k != "completion_mask"}).logits[:, :-1]
    mask = batch["completion_mask"][:, 1:]
    logp = logits.double().log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * mask
    chosen, rejected = (logp.sum(1) / mask.sum(1)).chunk(2)
    expected = -torch.nn.functional.logsigmoid(1.5 * (chosen - rejected) - 0.3).mean()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(losses_of(trainer)) == 2
    assert not calls


@pytest.mark.parametrize("task", ["text"], indirect=True)
def test_the_cooling_weighted_loss_is_the_one_of_cooling(task):
    args = {"max_steps": 2}
    expected = losses_of(make(CoolingDPOTrainer, task, args=args))
    assert (
        losses_of(make(CoolingDPOTrainer, task, args=args, cooling=None, loss=CoolingWeighted(BETA, COOLING)))
        == expected
    )


@pytest.mark.parametrize(
    ("options", "args", "message"),
    [
        ({"loss": "simpo"}, {}, "expected loss to have type PreferenceLoss, got str"),
        ({"loss": DPO(BETA), "cooling": Cooling()}, {}, r"expected cooling to have value None \(as loss is given\)"),
        ({"loss": DPO(0.2)}, {}, r"expected beta to have value 0.2 \(as loss has\), got 0.3"),
        ({"loss": SimPO(BETA), "ref_model": "model"}, {}, "expected ref_model to have value None"),
        ({"loss": SimPO(BETA)}, {"precompute_ref_log_probs": True}, "expected precompute_ref_log_probs to have value"),
        ({"loss": SimPO(BETA)}, {"sync_ref_model": True}, r"expected sync_ref_model to have value False \(SimPO"),
    ],
    ids=["type", "both", "beta", "ref_model", "precompute", "sync"],
)  # fmt: skip
@pytest.mark.parametrize("task", ["text"], indirect=True)
def test_wrong_values_are_refused_at_construction(task, options, args, message):
    with pytest.raises(ValueError, match=f"CoolingDPOTrainer: {message}"):
        make(CoolingDPOTrainer, task, args=args, **{"cooling": None, **options})
