"""Options and models that CoolingDPOTrainer supports, and those that it refuses by name."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
from peft import PrefixTuningConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from cwdpo_kernels.integrations.trl import CoolingDPOTrainer

sys.path.insert(0, str(Path(__file__).parent))
from dpo_task import COOLING, PROMPT, losses_of, make

# TRL 1.16 still uses names that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.mark.parametrize("task", ["text"], indirect=True)
@pytest.mark.parametrize("wrapped", [False, True])
def test_prefix_tuning_is_refused_by_name(task, wrapped):
    config = PrefixTuningConfig(**PROMPT)
    options = {"peft_config": config}
    model = None
    if wrapped:
        model, options = get_peft_model(copy.deepcopy(task.model), config), {}
    with pytest.raises(NotImplementedError, match=r"peft_type='PREFIX_TUNING' is not supported, only 'PROMPT_TUNING'"):
        make(CoolingDPOTrainer, task, model, **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss_type", ["ipo"]), ("loss_type", ["sigmoid", "sft"]), ("loss_weights", [0.5]), ("ld_alpha", 0.5),
        ("label_smoothing", 0.1), ("use_weighting", True), ("f_divergence_type", "js_divergence"),
        ("padding_free", True), ("use_liger_kernel", True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("task", ["text"], indirect=True)
def test_unsupported_options_are_named(task, name, value):
    with pytest.raises(NotImplementedError, match=rf"CoolingDPOTrainer: {name}=.* is not supported, only .* is"):
        make(CoolingDPOTrainer, task, args={name: value})


@pytest.mark.parametrize("task", ["text"], indirect=True)
def test_values_without_effect_are_accepted(task):
    changed = losses_of(make(CoolingDPOTrainer, task, args={"loss_weights": [1.0], "ld_alpha": 1.0, "max_steps": 2}))
    assert changed == losses_of(make(CoolingDPOTrainer, task, args={"max_steps": 2}))


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ({"beta": 0.0}, {}, r"expected beta to have a value > 0, got 0\.0"),
        ({}, {"normalize": "row"}, "expected normalize to have value 'sequence' or 'token', got 'row'"),
        ({}, {"cooling": None}, "expected cooling to have type Cooling, got NoneType"),
        ({"metric_for_best_model": "accuracy"}, {}, "metric_for_best_model to have a value in .*, got 'accuracy'"),
        ({"metric_for_best_model": "eval_entropy"}, {}, "metric_for_best_model to have .*, got 'entropy'"),
        ({"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 5}, {"eval_dataset": "two"},
         "metric_for_best_model to have a value in a_loss, .*, got 'loss'"),
    ],
    ids=["beta", "normalize", "cooling", "metric", "entropy", "datasets"],
)  # fmt: skip
@pytest.mark.parametrize("task", ["text"], indirect=True)
def test_wrong_values_are_refused_at_construction(task, args, options, message):
    rows = task.rows.select(range(4))
    datasets = {"two": {"a": rows, "b": rows}}.get(options.get("eval_dataset"), rows)
    with pytest.raises(ValueError, match=message):
        make(CoolingDPOTrainer, task, args={"eval_strategy": "steps", "eval_steps": 5, **args},
             **{**options, "eval_dataset": datasets})  # fmt: skip


@pytest.mark.parametrize("name", ["eval_loss", "rewards/margins", "eval_kept", "b_loss"])
@pytest.mark.parametrize("task", ["text"], indirect=True)
def test_a_measured_metric_chooses_the_best_model(task, name):
    rows = task.rows.select(range(4))
    args = {"metric_for_best_model": name, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2,
            "greater_is_better": False}  # fmt: skip
    trainer = make(
        CoolingDPOTrainer, task, args=args, eval_dataset={"a": rows, "b": rows} if name == "b_loss" else rows
    )
    trainer.train()
    assert trainer.state.best_metric is not None


@pytest.mark.parametrize("task", ["text"], indirect=True)
@pytest.mark.parametrize("positional", [False, True])
def test_compute_metrics_is_refused_at_construction(task, positional):
    function = lambda prediction: {}  # noqa: E731
    more = (None, task.rows, None, task.processor, function) if positional else ()
    options = {} if positional else {"compute_metrics": function}
    with pytest.raises(NotImplementedError, match="compute_metrics is not supported, because it needs logits"):
        CoolingDPOTrainer(str(task.folder), None, None, *more, cooling=COOLING, **options)


@pytest.mark.parametrize("task", ["text"], indirect=True)
def test_router_losses_are_named(task):
    config = MixtralConfig(
        vocab_size=task.model.config.vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2, pad_token_id=0,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    options = {"ref_model": copy.deepcopy(model), "args": {"router_aux_loss_coef": 0.01}}
    with pytest.raises(NotImplementedError, match=r"router_aux_loss_coef=0\.01 is not supported, only 0.0 is"):
        make(CoolingDPOTrainer, task, model, **options)


@pytest.mark.parametrize("task", ["text"], indirect=True)
def test_calls_that_need_logits_raise(task):
    trainer = make(CoolingDPOTrainer, task)
    with pytest.raises(NotImplementedError, match="predict is not supported, because it needs logits"):
        trainer.predict(trainer.train_dataset)
