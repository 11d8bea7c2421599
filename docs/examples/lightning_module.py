"""CW-DPO in a LightningModule that logs the loss's metrics.

python docs/examples/lightning_module.py
"""

import copy

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from cwdpo_kernels import Cooling, linear_cwdpo_loss, linear_sequence_logprob, shift_labels
from cwdpo_kernels.integrations.hugging_face import attach_head

PROMPT = 4


class CoolingDPO(lightning.LightningModule):
    def __init__(self, model, beta, cooling):
        super().__init__()
        self.model, self.reference = model, copy.deepcopy(model).eval().requires_grad_(False)
        self.beta, self.cooling = beta, cooling
        for module in (self.model, self.reference):
            attach_head(module)

    def training_step(self, batch):
        tokens = torch.cat([batch["chosen"], batch["rejected"]])  # chosen rows first
        labels = tokens.clone()
        labels[:, :PROMPT] = -100
        labels = shift_labels(labels)  # aligned: hidden[t] predicts labels[t]
        with torch.no_grad():
            ref_logp = self.reference(
                input_ids=tokens, head_op=lambda hidden, head: linear_sequence_logprob(hidden, head, labels).total
            )
        out = self.model(
            input_ids=tokens,
            head_op=lambda hidden, head: linear_cwdpo_loss(
                hidden, head, labels, *ref_logp.chunk(2), beta=self.beta, cooling=self.cooling
            ),
        )
        metrics = {"loss": out.loss, "margin": out.margin.mean(), "cooling_weight": out.cooling_weight.mean()}
        self.log_dict(metrics, batch_size=len(batch["chosen"]))
        return out.loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=3e-3)


class History(lightning.Callback):
    """Keeps what each step logged. Use a logger instead."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, *_):
        self.steps.append({name: value.item() for name, value in trainer.callback_metrics.items()})


torch.manual_seed(0)
pairs = []
for start in torch.randint(32, (32,)).tolist():
    prompt = torch.arange(start, start + PROMPT)
    chosen = torch.arange(start + PROMPT, start + PROMPT + 4)  # continues the count
    pairs.append({"chosen": torch.cat([prompt, chosen]), "rejected": torch.cat([prompt, torch.randint(64, (4,))])})
config = LlamaConfig(
    vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
)
# An untrained model gives every token a log-prob of -log 64 = -4.2 nats.
module = CoolingDPO(LlamaForCausalLM(config), beta=0.1, cooling=Cooling(logp_floor=-4.5, temperature=0.5))
history = History()
trainer = lightning.Trainer(
    max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, callbacks=[history],
)  # fmt: skip
trainer.fit(module, DataLoader(pairs, batch_size=8, shuffle=True))

for name, first in history.steps[0].items():
    print(f"{name:16} {first:8.4f} -> {history.steps[-1][name]:8.4f}")
