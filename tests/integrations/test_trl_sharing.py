"""CoolingDPOTrainer(prefix_sharing=True) against the same trainer on separate rows: losses, metrics and gradients."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from cwdpo_kernels import Cooling
from cwdpo_kernels.integrations import trl_sharing
from cwdpo_kernels.integrations.trl import METRICS, CoolingDPOTrainer

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "trainer"))
import tiny_models
import tiny_processors
from dpo_task import COOLING, PROMPT, Task, first_batch, losses_of, make, moved

# TRL 1.16 still uses names that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
OWN = ("loss", "grad_norm", *METRICS)


@pytest.fixture
def qwen(tmp_path):
    """Images of different sizes, positions in three dimensions, and every fourth row without an image."""
    model, _ = tiny_models.qwen2_5_vl()
    processor = tiny_processors.qwen2_5_vl()
    with torch.no_grad():
        model.resize_token_embeddings(len(processor.tokenizer))
    model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    rows = []
    for index in range(16):
        image = Image.new("RGB", [(16, 16), (32, 16), (16, 24)][index % 3], (10 * index, 99, 200))
        rows.append({
            "images": [image] if index % 4 else [], "prompt": "<image> describe a" if index % 4 else "describe a",
            "chosen": " red square </s>", "rejected": " blue square and square </s>" if index % 2 else " blue </s>",
        })  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    return Task(tmp_path / "model", model, processor, Dataset.from_list(rows))


def lora():
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")


def with_long_prompts(task):
    """The task with longer prompts in every third row."""
    rows = [dict(row) for row in task.rows]
    for row in rows[::3]:
        row["prompt"] += " describe" * 8
    return task._replace(rows=Dataset.from_list(rows))


def log_of(task, sharing, args, **options):
    """What five steps and two evaluations log, and the trained weights."""
    policy = None
    if "ref_model" in options:
        policy, options["ref_model"] = moved(copy.deepcopy(task.model), seed=2), copy.deepcopy(options["ref_model"])
    torch.manual_seed(0)
    args = {"eval_strategy": "steps", "eval_steps": 3, **args}
    evaluated = task.rows.select(range(6))
    trainer = make(
        CoolingDPOTrainer, task, policy, args=args, eval_dataset=evaluated, prefix_sharing=sharing, **options
    )
    sizes = []
    trainer.model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    trainer.train()
    assert (1 in sizes) is bool(sharing)
    own = (*OWN, *(f"eval_{name}" for name in OWN))
    log = [{name: entry[name] for name in own if name in entry} for entry in trainer.state.log_history]
    return log, trainer.model.state_dict()


def assert_equal_training(task, args=None, peft=False, **options):
    """Everything that is logged, and the weights after training, are equal within rounding."""
    found = []
    for sharing in (None, True):
        adapter = {"peft_config": lora()} if peft else {}  # peft notes the model in it
        found.append(log_of(task, sharing, args or {}, **adapter, **options))
    (log, weights), (shared_log, shared_weights) = found
    assert len(log) == len(shared_log) > 5
    for entry, shared in zip(log, shared_log, strict=True):
        for prefix in ("", "eval_"):
            if abs(entry.get(f"{prefix}rewards/margins", 1)) < 1e-6:  # policy and reference are equal
                del entry[f"{prefix}rewards/accuracies"], shared[f"{prefix}rewards/accuracies"]
        assert shared == pytest.approx(entry, rel=1e-4, abs=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(shared_weights[name], value, rtol=1e-4, atol=2e-4, msg=name)


def gradients(task, sharing, batch_size=4, cooling=COOLING, args=None, **options):
    policy, reference = moved(copy.deepcopy(task.model)), copy.deepcopy(task.model)
    args = {"per_device_train_batch_size": batch_size, **(args or {})}
    trainer = make(CoolingDPOTrainer, task, policy, ref_model=reference, args=args, cooling=cooling,
                   prefix_sharing=sharing, **options)  # fmt: skip
    loss = trainer.compute_loss(trainer.model, first_batch(trainer))
    loss.backward()
    grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), grads, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def assert_equal_gradients(task, **options):
    loss, grads, metrics = gradients(task, False, **options)
    shared_loss, shared, shared_metrics = gradients(task, True, **options)
    assert shared_loss == pytest.approx(loss, rel=1e-5)
    assert shared_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    assert shared.keys() == grads.keys()
    largest = max(grad.abs().max().item() for grad in grads.values())
    for name, grad in grads.items():
        # Those of key biases are 0 but for rounding errors: one rounding of the largest entry is 1e-7 of it.
        scale = max(grad.abs().max().item(), 1e-2 * largest)
        torch.testing.assert_close(shared[name], grad, atol=1e-5 * scale, rtol=0, msg=name)
    return loss, metrics


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("cooling", [COOLING, Cooling(constant=1.0)], ids=["adaptive", "one"])
def test_gradients(task, cooling, batch_size):
    assert_equal_gradients(task, cooling=cooling, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_gradients_with_positions_in_three_dimensions(qwen, batch_size):
    assert_equal_gradients(qwen, batch_size=batch_size)


def test_training_with_an_explicit_reference(task):
    assert_equal_training(task, {"gradient_accumulation_steps": 2}, ref_model=task.model)


def test_training_of_qwen(qwen):
    assert_equal_training(qwen, {"gradient_accumulation_steps": 2}, ref_model=qwen.model)


def test_training_with_models_by_name(task):
    assert_equal_training(task)


def test_lora(task):
    assert_equal_training(task, peft=True)


@pytest.mark.parametrize("task", ["text"], indirect=True)
@pytest.mark.parametrize("options", [{}, {"peft": True}], ids=["full", "lora"])
def test_precomputed_reference(task, options):
    assert_equal_training(task, {"precompute_ref_log_probs": True}, **options)


@pytest.mark.parametrize("task", ["text", "images"], indirect=True)
def test_bfloat16(task):
    """Attention and products round to bfloat16, in another order on trees."""
    losses = []
    for sharing in (False, True):
        policy, reference = moved(copy.deepcopy(task.model)), copy.deepcopy(task.model)
        args = {"bf16": True, "max_steps": 3}
        losses.append(
            losses_of(make(CoolingDPOTrainer, task, policy, ref_model=reference, args=args, prefix_sharing=sharing))
        )
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("options", [{}, {"peft_config": lora}], ids=["full", "lora"])
def test_rewards_of_the_first_step_are_zero(task, options):
    options = {name: value() for name, value in options.items()}
    trainer = make(CoolingDPOTrainer, task, args={"max_steps": 1}, prefix_sharing=True, **options)
    trainer.train()
    rewards = {value for name, value in trainer.state.log_history[0].items() if name.startswith("rewards/")}
    assert rewards == {0.0}


def test_gradient_checkpointing(task):
    assert_equal_training(task, {"gradient_checkpointing": True}, peft=True)


@pytest.mark.parametrize("task", ["text"], indirect=True)
@pytest.mark.parametrize("limit", [3, 5, 6, 8])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncated_rows(task, mode, limit):
    """keep_end cuts the prompts of a pair differently. Such a pair gets two trees."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*truncation_mode.*")
        args = {"max_length": limit, "truncation_mode": mode}
        loss, _ = assert_equal_gradients(with_long_prompts(task), batch_size=8, args=args)
    assert abs(loss - 0.6931) > 1e-3


@pytest.mark.filterwarnings("ignore:.*pairs with an empty answer:UserWarning")
@pytest.mark.parametrize("task", ["images"], indirect=True)  # TRL removes such rows itself if there are no images
@pytest.mark.parametrize("cooling", [COOLING, Cooling(constant=1.0)], ids=["adaptive", "one"])
@pytest.mark.parametrize("limit", [14, 6], ids=["some", "all"])
def test_empty_answers(task, cooling, limit):
    task = with_long_prompts(task)
    trainer = make(CoolingDPOTrainer, task, args={"max_length": limit, "per_device_train_batch_size": 16})
    empty = first_batch(trainer)["completion_mask"].sum(1) == 0
    assert empty.any()
    assert empty.all() == (limit == 6)
    assert_equal_gradients(task, batch_size=16, cooling=cooling, args={"max_length": limit})


@pytest.mark.parametrize("task", ["text"], indirect=True)
def test_one_empty_answer_of_a_pair(task):
    """A collator of one's own can give one. The answer after it must not move into its place."""

    def run(sharing):
        trainer = make(CoolingDPOTrainer, task, ref_model=moved(copy.deepcopy(task.model)), prefix_sharing=sharing)
        batch = first_batch(trainer)
        batch["completion_mask"][[1, 7]] = 0  # labels that are masked out
        keep = batch["completion_mask"][2].argmax()
        batch["attention_mask"][2, keep:] = batch["completion_mask"][2, keep:] = 0  # no tokens either
        with pytest.warns(UserWarning, match="got 3 of 4 pairs with an empty answer"):
            loss = trainer.compute_loss(trainer.model, batch)
        return {"loss": loss.item(), **{name: values[-1] for name, values in trainer._metrics["train"].items()}}

    assert run(True) == pytest.approx(run(False), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("task", ["images"], indirect=True)
def test_images_are_encoded_once_per_pair(task):
    trainer = make(CoolingDPOTrainer, task, prefix_sharing=True)
    batch = first_batch(trainer)
    trainer.compute_loss(trainer.model, batch)  # the first batch is compared
    counts = []

    def note(module, args, kwargs):
        counts.append(tuple(kwargs["input_ids"].shape) if "input_ids" in kwargs else len((*args, *kwargs.values())[0]))

    for model in (trainer.model, trainer.ref_model):
        for module in (model.base_model, model.base_model.vision_tower):
            module.register_forward_pre_hook(note, with_kwargs=True)
    trainer.compute_loss(trainer.model, batch)
    prompt, answers = 6, int(batch["completion_mask"].sum())
    tokens = 4 * prompt + answers - 8  # the last token of an answer is no input
    assert counts == [(1, tokens), 4, (1, tokens), 4]


@pytest.mark.parametrize("task", ["images"], indirect=True)
@pytest.mark.parametrize("case", ["prompts", "images"])
def test_pairs_with_images_that_differ_run_on_separate_rows(task, case):
    losses = []
    for sharing in (False, True):
        trainer = make(CoolingDPOTrainer, task, ref_model=moved(copy.deepcopy(task.model)), prefix_sharing=sharing)
        batch = first_batch(trainer)
        if case == "images":
            batch["pixel_values"][5] += 1
        else:
            batch["input_ids"][5, 5] = 7
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            losses += [trainer.compute_loss(trainer.model, batch).item() for _ in range(2)]
        reason = (
            "a pair have different pixel_values" if case == "images" else "pair 1 have images and different prompts"
        )
        expected = f"CoolingDPOTrainer: a batch runs without prefix_sharing: the rows of {reason} (warns only once)"
        messages = [str(each.message) for each in warned if "prefix_sharing" in str(each.message)]
        assert len(messages) == sharing
        assert all(message.startswith(expected) for message in messages)
    assert len(set(losses)) == 1


def test_a_model_that_computes_other_values_on_trees_is_refused_on_the_first_batch(task, monkeypatch):
    """Positions that do not restart at the answers, say."""
    plain = trl_sharing.tree_of_pairs

    def wrong(*args):
        batch = plain(*args)
        positions = torch.arange(batch.tree.tokens)[None]
        return batch._replace(inputs={**batch.inputs, "position_ids": positions})

    monkeypatch.setattr(trl_sharing, "tree_of_pairs", wrong)
    trainer = make(CoolingDPOTrainer, task, prefix_sharing=True)
    message = r"to have log-probs within 1\.0e-04 nats of those of separate rows, got .*ForC.* Use prefix_sharing=False"
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.parametrize("task", ["text"], indirect=True)
def test_a_reference_of_another_kind_is_compared_too(task, monkeypatch):
    trainer = make(CoolingDPOTrainer, task, prefix_sharing=True)
    compared = []
    plain = trl_sharing.compare_forwards
    monkeypatch.setattr(trl_sharing, "compare_forwards", lambda *args: compared.append(args[0]) or plain(*args))
    trainer.train()
    assert len(compared) == 2
    assert {id(model) for model in compared} == {id(trainer.model), id(trainer.ref_model)}


@pytest.mark.parametrize("task", ["text"], indirect=True)
@pytest.mark.parametrize("case", ["recurrent", "dropout", "reference", "compiled", "prompts", "value"])
def test_what_cannot_share_is_refused_at_construction(task, case):
    text = task.model.config.to_dict()
    dropout = LlamaForCausalLM(LlamaConfig(**{**text, "attention_dropout": 0.1}))
    model, options, args = copy.deepcopy(task.model), {"ref_model": copy.deepcopy(task.model)}, {}
    reason = r"LlamaForCausalLM has a dropout of 0\.1 in its attention"
    if case == "recurrent":
        config = Qwen3NextConfig(
            vocab_size=text["vocab_size"], hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_experts=2,
            num_attention_heads=2, num_key_value_heads=2, moe_intermediate_size=16, layer_types=["linear_attention"],
            shared_expert_intermediate_size=16, pad_token_id=0,
        )  # fmt: skip
        model = Qwen3NextForCausalLM(config)
        reason = r"Qwen3NextForCausalLM has layers with a recurrent state \(linear_attention\), which cannot branch"
    elif case == "dropout":
        model = dropout
    elif case == "reference":
        options = {"ref_model": dropout}
    elif case == "compiled":
        args, reason = {"torch_compile": True}, "torch_compile is on"
    elif case == "prompts":
        options, reason = {"peft_config": PromptTuningConfig(**PROMPT)}, "prompt learning of peft puts virtual tokens"
    if case == "value":
        with pytest.raises(ValueError, match="expected prefix_sharing to have value True or False, got 'auto'"):
            make(CoolingDPOTrainer, task, prefix_sharing="auto")
        return
    with pytest.raises(NotImplementedError, match=rf"prefix_sharing=True is not supported here: {reason}"):
        make(CoolingDPOTrainer, task, model, args=args, prefix_sharing=True, **options)


@pytest.mark.parametrize("task", ["text"], indirect=True)
def test_saved_models_do_not_name_the_attention(task):
    trainer = make(CoolingDPOTrainer, task, prefix_sharing=True, args={"max_steps": 1})
    trainer.train()
    trainer.save_model(str(task.folder / "out"))
    assert "tree" not in (task.folder / "out" / "config.json").read_text()


@pytest.mark.parametrize("task", ["images"], indirect=True)
@pytest.mark.parametrize("case", ["lora", "tower", "adapter in the tower"])
def test_policy_and_reference_share_the_features_of_a_frozen_vision_path(task, case):
    """A reference without adapters has other features if the tower has one."""
    options = {"ref_model": copy.deepcopy(task.model)}
    if case != "tower":
        modules = r".*(language_model|vision_tower).*q_proj" if case != "lora" else r".*language_model.*(q|v)_proj"
        options = {"peft_config": LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM")}
    losses = []
    for sharing in (False, True):
        policy = moved(copy.deepcopy(task.model))
        trainer = make(CoolingDPOTrainer, task, policy, prefix_sharing=sharing, **copy.deepcopy(options))
        if case == "tower":
            for name in ("vision_tower", "multi_modal_projector"):
                getattr(trainer.model.base_model, name).requires_grad_(False)
                reference, own = getattr(trainer.ref_model.base_model, name), getattr(trainer.model.base_model, name)
                reference.load_state_dict(own.state_dict())
        elif case != "lora":
            for name, parameter in trainer.model.named_parameters():
                torch.nn.init.normal_(parameter, std=0.1) if "lora_B" in name else None
                parameter.requires_grad_(parameter.requires_grad and "vision_tower" not in name)
        batch = first_batch(trainer)
        trainer.compute_loss(trainer.model, batch)
        encoded = []
        for model in {trainer.model, trainer.ref_model} - {None}:
            tower = next(module for name, module in model.named_modules() if name.endswith("vision_tower"))
            tower.register_forward_hook(lambda *_, seen=encoded: seen.append(1))
        losses += [trainer.compute_loss(trainer.model, batch).item() for _ in range(2)]
        if sharing:
            assert len(encoded) == (4 if case == "adapter in the tower" else 2)
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
