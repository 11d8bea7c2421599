"""TRL's DPOTrainer and CoolingDPOTrainer with the same inputs: images, text, peft, precomputed references, logs."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch.nn import functional as F
from trl import DPOTrainer

from cwdpo_kernels import Cooling
from cwdpo_kernels.integrations.trl import METRICS, CoolingDPOTrainer

sys.path.insert(0, str(Path(__file__).parent))
from dpo_task import BETA, COOLING, PROMPT, first_batch, losses_of, make, moved

# TRL 1.16 still uses names that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def move_adapter(model, seed):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and ".default." in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def float64_sequences(task, model, batch):
    """Total and mean log-probs [2P] of the completions, from full logits in float64."""
    twin = copy.deepcopy(task.model)  # not of `model`: TRL's patched forward would still call `model`
    twin.load_state_dict(model.state_dict())
    twin = twin.double().eval()
    mask = batch["completion_mask"][:, 1:].bool()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in batch.items() if k != "completion_mask"}
    with torch.no_grad():
        logp = twin(**inputs).logits[:, :-1].log_softmax(-1)
    assert logp.dtype == torch.float64
    total = (logp.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1) * mask).sum(-1)
    return total, total / mask.sum(-1)


def float64_loss(task, policy, reference, batch):
    """-log sigmoid(beta * (D_w - w_c * D_l)), and the mean of w_c."""
    total, mean = float64_sequences(task, policy, batch)
    chosen, rejected = (total - float64_sequences(task, reference, batch)[0]).chunk(2)
    weight = ((mean.chunk(2)[1] - COOLING.logp_floor) / COOLING.temperature).sigmoid()
    return -F.logsigmoid(BETA * (chosen - weight * rejected)).mean().item(), weight.mean().item()


def gradients(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def test_five_steps_with_models_by_name(task):
    trainer = make(CoolingDPOTrainer, task, args={"bf16": True, "eval_strategy": "steps", "eval_steps": 5},
                   eval_dataset=task.rows.select(range(8)))  # fmt: skip
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5]
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=2e-3)  # log 2: policy and reference are equal
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.05
    assert steps[-1]["rewards/margins"] > 0.1
    assert all(0 < entry["cooling_weight"] < 1 and entry["kept"] == 1 for entry in steps)
    assert steps[-1]["mean_logps/chosen"] > steps[0]["mean_logps/chosen"]
    assert steps[-1]["num_tokens"] > steps[0]["num_tokens"] > 0
    (evaluation,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluation["eval_loss"] < 0.69
    assert {f"eval_{name}" for name in METRICS} <= evaluation.keys()
    assert 0 < evaluation["eval_cooling_weight"] < 1
    head = "lm_head.weight"
    assert not torch.equal(trainer.model.state_dict()[head], before[head])


def test_first_step_equals_float64(task):
    policy, reference = moved(copy.deepcopy(task.model)), copy.deepcopy(task.model)
    trainer = make(CoolingDPOTrainer, task, policy, ref_model=reference, args={"max_steps": 1})
    batch = first_batch(trainer)
    loss, weight = float64_loss(task, policy, reference, batch)
    assert abs(loss - 0.6931) > 0.02  # otherwise the reference would not be tested
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(loss, rel=2e-5)
    assert entry["cooling_weight"] == pytest.approx(weight, rel=2e-5)


def test_weight_one_equals_trl(task):
    found = []
    for kind in (CoolingDPOTrainer, DPOTrainer):
        policy, reference = moved(copy.deepcopy(task.model)), copy.deepcopy(task.model)
        trainer = make(kind, task, policy, ref_model=reference, cooling=Cooling(constant=1.0))
        found.append((trainer, *gradients(trainer, first_batch(trainer))))
    (ours, loss, grads), (theirs, their_loss, their_grads) = found
    assert loss == pytest.approx(their_loss, rel=1e-5)
    assert grads.keys() == their_grads.keys()
    assert their_grads["lm_head.weight"].abs().max() > 1e-3
    for name, grad in their_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=2e-6, msg=name)
    shared = {name for name in theirs._metrics["train"] if name.startswith(("rewards/", "logps/", "num_tokens"))}
    assert len(shared) == 7
    for name in shared:
        assert ours._metrics["train"][name] == pytest.approx(theirs._metrics["train"][name], rel=1e-4, abs=1e-5), name


def lora_config():
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")  # peft notes the model in it


@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
def test_lora_reference(task, trained):
    """As in TRL: the reference of a new adapter is the base model; that of a trained adapter is a copy of it."""
    policy, reference = copy.deepcopy(task.model), task.model
    if trained:
        policy = get_peft_model(policy, lora_config())
        move_adapter(policy, seed=2)
        reference = copy.deepcopy(policy).merge_and_unload()
        trainer = make(CoolingDPOTrainer, task, policy)
        assert "ref" in trainer.model.peft_config
    else:
        trainer = make(CoolingDPOTrainer, task, policy, peft_config=lora_config())
    assert trainer.ref_model is None
    move_adapter(trainer.model, seed=1)
    batch = first_batch(trainer)
    logp = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    torch.testing.assert_close(logp.double(), float64_sequences(task, reference, batch)[0], rtol=1e-5, atol=1e-5)
    policy = copy.deepcopy(trainer.model).merge_and_unload()
    loss, found = float64_loss(task, policy, reference, batch)[0], gradients(trainer, batch)
    assert abs(loss - 0.6931) > 0.01
    assert found[0] == pytest.approx(loss, rel=2e-5)
    assert found[1]
    assert all("lora_" in name and ".default." in name and grad.abs().max() > 0 for name, grad in found[1].items())


@pytest.mark.parametrize("task", ["text"], indirect=True)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_precomputed_reference_changes_nothing(task, lora):
    losses = []
    for precompute in (False, True):
        options = {"peft_config": lora_config()} if lora else {}
        trainer = make(CoolingDPOTrainer, task, args={"precompute_ref_log_probs": precompute}, **options)
        assert ("ref_chosen_logps" in trainer.train_dataset.column_names) is precompute
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("task", ["text"], indirect=True)
@pytest.mark.parametrize("kept", [0, 2])
def test_dropped_pairs(task, kept):
    trainer = make(CoolingDPOTrainer, task, copy.deepcopy(task.model), ref_model=moved(copy.deepcopy(task.model)))
    batch = first_batch(trainer)
    mean = float64_sequences(task, trainer.model, batch)[1].chunk(2)[1].sort().values
    trainer.cooling = Cooling(-2.8, 0.5, drop_below=mean[1:3].mean().item() if kept else 0.0)
    trainer.compute_loss(trainer.model, batch)
    metrics = trainer._metrics["train"]
    assert metrics["kept"] == [kept / 4]
    if kept:
        assert metrics["cooling_weight"] == [pytest.approx(((mean[2:] + 2.8) / 0.5).sigmoid().mean().item(), rel=1e-5)]
    else:
        assert "cooling_weight" not in metrics


def some_empty_answers(task):
    """The task with longer prompts in every third row, and the `max_length` at which these rows have empty answers."""
    rows = [dict(row) for row in task.rows]
    for row in rows[::3]:
        row["prompt"] += " describe" * 8
    task = task._replace(rows=Dataset.from_list(rows))
    ids = first_batch(make(CoolingDPOTrainer, task, args={"per_device_train_batch_size": 16, "max_length": None}))
    return task, int((ids["completion_mask"] == 0).int().argmin(1).max())


@pytest.mark.parametrize("task", ["images"], indirect=True)  # TRL removes such rows itself if there are no images
def test_empty_answers_count_as_in_trl_if_the_weight_is_one(task):
    task, limit = some_empty_answers(task)
    args = {"max_length": limit, "max_steps": 4}
    ours = make(CoolingDPOTrainer, task, args=args, cooling=Cooling(constant=1.0))
    mask = first_batch(ours)["completion_mask"].sum(1)
    assert (mask == 0).any()
    assert (mask > 0).any()
    theirs = losses_of(make(DPOTrainer, task, args=args))
    assert losses_of(ours) == pytest.approx(theirs, rel=1e-4)
    assert theirs[-1] < theirs[0] - 0.05
    assert {entry["kept"] for entry in ours.state.log_history if "kept" in entry} == {1.0}


@pytest.mark.parametrize("task", ["images"], indirect=True)
def test_other_weights_leave_empty_answers_out_and_warn_once(task):
    task, limit = some_empty_answers(task)
    trainer = make(CoolingDPOTrainer, task, args={"max_length": limit, "per_device_train_batch_size": 16})
    message = rf"got 6 of 16 pairs with an empty answer in a batch \(max_length={limit}\)\. They are left out"
    with pytest.warns(UserWarning, match=message) as warned:
        trainer.train()
    assert len([warning for warning in warned if "empty answer" in str(warning.message)]) == 1
    assert trainer.state.log_history[0]["kept"] == 10 / 16


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("cooling", [COOLING, Cooling(constant=1.0)], ids=["adaptive", "one"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_rewards_of_the_first_step_are_zero(task, bf16, cooling, lora):
    options = {"peft_config": lora_config()} if lora else {}
    trainer = make(CoolingDPOTrainer, task, args={"max_steps": 1, "bf16": bf16}, cooling=cooling, **options)
    trainer.train()
    rewards = {name: value for name, value in trainer.state.log_history[0].items() if name.startswith("rewards/")}
    assert rewards == dict.fromkeys(
        ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"), 0.0
    )


# torch 2.11's compiler asks for it after a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("task", ["text"], indirect=True)
@pytest.mark.parametrize("case", ["full", "ref_model precomputed"])
def test_compiled(task, case):
    """The models are compiled once for each grad mode, not again at every step."""
    losses = []
    for compiled in (False, True):
        options = {"ref_model": moved(copy.deepcopy(task.model))} if "ref_model" in case else {}
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        args = {"torch_compile": compiled, "torch_compile_backend": "eager", "pad_to_multiple_of": 16, "max_steps": 2}
        args["precompute_ref_log_probs"] = "precomputed" in case
        losses.append(losses_of(make(CoolingDPOTrainer, task, args=args, **options)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("prompt", ["prompt", "p_tuning"])
def test_prompt_tuning_equals_trl(task, prompt):
    found = {}
    for kind in (CoolingDPOTrainer, DPOTrainer):
        torch.manual_seed(0)
        args = {"max_steps": 3, "learning_rate": 0.1}
        encoder = {"encoder_hidden_size": 8}
        config = PromptTuningConfig(**PROMPT) if prompt == "prompt" else PromptEncoderConfig(**PROMPT, **encoder)
        trainer = make(kind, task, args=args, cooling=Cooling(constant=1.0), peft_config=config)
        found[kind] = losses_of(trainer)
    assert found[CoolingDPOTrainer] == pytest.approx(found[DPOTrainer], rel=1e-4)


@pytest.mark.parametrize("task", ["images"], indirect=True)
def test_every_key_of_the_processor_reaches_the_model(task):
    trainer = make(CoolingDPOTrainer, task)
    batch = first_batch(trainer)
    seen = []
    for model in (trainer.model, trainer.ref_model):
        model.base_model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    trainer.compute_loss(trainer.model, {**batch, "mm_token_type_ids": torch.zeros_like(batch["input_ids"])})
    expected = {"input_ids", "attention_mask", "pixel_values", "mm_token_type_ids", "use_cache"}
    assert seen == [expected, expected]


def test_the_other_adapters_need_no_trl():
    code = "import sys; sys.modules.update(trl=None); import cwdpo_kernels.integrations.hugging_face"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
