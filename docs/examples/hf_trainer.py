"""CW-DPO in `transformers.Trainer`, through its `compute_loss_func`.

The collator puts a `head_op` into the batch. The model's forward calls it with its hidden states and head, and returns
the result. So the loss is computed inside the forward, without logits, and `compute_loss_func` only reads it.

    python docs/examples/hf_trainer.py
"""

import tempfile
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from cwdpo_kernels import Cooling, linear_cwdpo_loss, linear_sequence_logprob, shift_labels
from cwdpo_kernels.integrations.hugging_face import attach_head

# An untrained model gives every token a log-prob of -log 64 = -4.2 nats.
COOLING = Cooling(logp_floor=-4.5, temperature=0.5)
PROMPT = 4


@dataclass
class PairLoss:
    """The `head_op` of a batch. A class, because DataLoader workers cannot pickle a lambda."""

    labels: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor

    def __call__(self, hidden, head):
        labels, *reference = (x.to(hidden.device) for x in (self.labels, self.ref_chosen, self.ref_rejected))
        return linear_cwdpo_loss(hidden, head, labels, *reference, beta=0.1, cooling=COOLING)


def collate(rows):
    """Chosen rows first, rejected rows second."""
    tokens = [torch.tensor(row["prompt"] + row[kind]) for kind in ("chosen", "rejected") for row in rows]
    input_ids = pad_sequence(tokens, batch_first=True)
    labels = pad_sequence(tokens, batch_first=True, padding_value=-100)
    labels[:, :PROMPT] = -100
    attention_mask = pad_sequence([torch.ones_like(x) for x in tokens], batch_first=True)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    if "ref_chosen" in rows[0]:
        reference = (torch.tensor([row[name] for row in rows]) for name in ("ref_chosen", "ref_rejected"))
        batch["head_op"] = PairLoss(shift_labels(labels), *reference)
    return batch


torch.manual_seed(0)
starts = torch.randint(32, (32,)).tolist()
rows = [
    {
        "prompt": [start + index for index in range(PROMPT)],
        "chosen": [start + PROMPT + index for index in range(3 + start % 3)],  # continues the count
        "rejected": torch.randint(64, (4,)).tolist(),
    }
    for start in starts
]
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
)
attach_head(model)

# Reference log-probs of every row, computed before training: two numbers per pair.
with torch.no_grad():
    batch = collate(rows)
    labels = shift_labels(batch.pop("labels"))
    logp = model(**batch, head_op=lambda hidden, head: linear_sequence_logprob(hidden, head, labels).total)
for row, ref_chosen, ref_rejected in zip(rows, *logp.view(2, -1).tolist(), strict=True):
    row.update(ref_chosen=ref_chosen, ref_rejected=ref_rejected)

args = TrainingArguments(
    tempfile.mkdtemp(), max_steps=20, per_device_train_batch_size=8, learning_rate=3e-3, logging_steps=1, use_cpu=True,
    save_strategy="no", report_to="none", disable_tqdm=True,
    remove_unused_columns=False,  # the collator needs all columns
    average_tokens_across_devices=False,  # the loss is a mean over pairs, so devices can average it
)  # fmt: skip
history = []


def compute_loss(output, labels, num_items_in_batch=None):
    """`output` is the CWDPOOutput. Trainer expects a loss already divided by the accumulation steps."""
    history.append(output)
    return output.loss / args.gradient_accumulation_steps


Trainer(model, args, data_collator=collate, train_dataset=rows, compute_loss_func=compute_loss).train()

first, last = history[0], history[-1]
print(f"loss             {first.loss:8.4f} -> {last.loss:8.4f}")
print(f"reward margin    {first.margin.mean():8.4f} -> {last.margin.mean():8.4f}")
print(f"cooling weight   {first.cooling_weight.mean():8.4f} -> {last.cooling_weight.mean():8.4f}")
