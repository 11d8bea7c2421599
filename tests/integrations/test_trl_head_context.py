"""use_fused_head: where it puts our head, for how long, and which versions and models it refuses."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import types

import pytest
import torch
import transformers as hf
import trl.trainer.utils
from trl import SFTConfig, SFTTrainer

from cwdpo_kernels.integrations import trl_head
from cwdpo_kernels.integrations.hugging_face import HeadError
from cwdpo_kernels.integrations.trl import use_fused_head
from cwdpo_kernels.integrations.trl_head import add_fused_lm_head

# TRL 1.16 still uses names that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

THEIRS = trl.trainer.utils.add_fused_lm_head
OURS = trl_head._replacement
TRAINERS = ("sft_trainer", "dpo_trainer", "kto_trainer", "grpo_trainer", "rloo_trainer")


def used():
    """The functions in the modules of the five trainers and in the module that defines it."""
    modules = [importlib.import_module(f"trl.trainer.{name}") for name in (*TRAINERS, "utils")]
    return {module.add_fused_lm_head for module in modules}


def test_it_is_used_in_every_trainer_until_the_context_ends():
    imported_later = types.ModuleType("imported_later")
    before = types.ModuleType("imported_before")
    before.add_fused_lm_head = THEIRS
    sys.modules |= {"imported_later": imported_later, "imported_before": before}
    try:
        assert used() == {THEIRS}
        with use_fused_head():
            assert used() == {OURS}
            imported_later.add_fused_lm_head = trl.trainer.utils.add_fused_lm_head
            assert before.add_fused_lm_head is trl.trainer.add_fused_lm_head is OURS
            with use_fused_head():
                assert used() == {OURS}
            assert used() == {OURS}
        assert used() == {THEIRS}
        assert imported_later.add_fused_lm_head is before.add_fused_lm_head is THEIRS
        assert trl.trainer.add_fused_lm_head is THEIRS
        handle = use_fused_head()  # without a context
        assert used() == {OURS}
        handle.close()
        handle.close()
        assert used() == {THEIRS}
        assert trl_head.add_fused_lm_head is add_fused_lm_head is not THEIRS
        with pytest.raises(KeyError), use_fused_head():
            raise KeyError
        assert used() == {THEIRS}
    finally:
        del sys.modules["imported_later"], sys.modules["imported_before"]


@pytest.mark.parametrize("version", ["1.15.2", "1.17.0", "2.0.0"])
def test_unknown_versions_are_refused(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"trl": version}[name])
    message = rf"use_fused_head: expected trl to have version >= 1.16 and < 1.17, got {version}. Install .*pip install"
    with pytest.raises(NotImplementedError, match=message):
        use_fused_head()
    assert used() == {THEIRS}


def trainer(task, model, **options):
    args = SFTConfig(
        str(task.folder / "run"), max_steps=2, bf16=False, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, **options,
    )  # fmt: skip
    rows = task.rows.map(lambda row: {"completion": row["chosen"]}, remove_columns=["chosen", "rejected"])
    return SFTTrainer(model, args=args, train_dataset=rows, processing_class=task.processor)


@pytest.mark.parametrize("task", ["text"], indirect=True)
def test_a_model_that_does_not_fit_is_an_error_and_never_falls_back(task):
    task.model.lm_head = torch.nn.Sequential(task.model.lm_head, torch.nn.Tanh())
    with use_fused_head(), pytest.raises(HeadError, match="make the trainer without use_fused_head"):
        trainer(task, task.model)


@pytest.mark.parametrize("task", ["text"], indirect=True)
def test_a_trainer_keeps_the_head_that_it_was_made_with(task):
    with use_fused_head():
        made = trainer(task, task.model)
    inside = made.model.forward.__func__.__code__.co_filename
    assert inside.endswith("trl_head.py")
    made.train()
    assert made.state.global_step == 2
    assert used() == {THEIRS}
    patched = trainer(task, hf.LlamaForCausalLM(task.model.config)).model  # by TRL's own function
    with pytest.raises(HeadError, match="forwards that are not patched"), use_fused_head():
        trainer(task, patched)
