"""CW-DPO in a plain PyTorch loop, for any model with hidden states and a linear head.

python docs/examples/plain_pytorch.py
"""

import copy

import torch
from torch import nn

from cwdpo_kernels import Cooling, linear_cwdpo_loss, linear_sequence_logprob, shift_labels

VOCAB, PAIRS, PROMPT, ANSWER = 64, 16, 4, 6


class TinyLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 48)
        self.backbone = nn.GRU(48, 48, batch_first=True)
        self.lm_head = nn.Linear(48, VOCAB, bias=False)

    def forward(self, tokens, head_op):
        """Returns `head_op(hidden, head)` instead of logits.

        Call it inside forward, so that it also works under DDP and FSDP. Reading the weight from outside does not.
        """
        hidden, _ = self.backbone(self.embed(tokens))
        return head_op(hidden, self.lm_head.weight)


def counting_pairs():
    """Tokens and labels [2P, T], chosen rows first.

    Chosen answers continue the prompt's count, rejected ones are noise.
    """
    prompt = torch.randint(VOCAB // 2, (PAIRS, 1)) + torch.arange(PROMPT)
    chosen = prompt[:, -1:] + 1 + torch.arange(ANSWER)
    rejected = torch.randint(VOCAB, (PAIRS, ANSWER))
    tokens = torch.cat([prompt.repeat(2, 1), torch.cat([chosen, rejected])], dim=1)
    labels = tokens.clone()
    labels[:, :PROMPT] = -100  # only answers are labeled
    return tokens, shift_labels(labels)  # aligned: hidden[t] predicts labels[t]


torch.manual_seed(0)
tokens, labels = counting_pairs()
model = TinyLanguageModel()

# The reference is a copy of the initial model. Its log-probs are computed once, without gradients.
with torch.no_grad():
    reference = copy.deepcopy(model)
    ref_logp = reference(tokens, lambda hidden, head: linear_sequence_logprob(hidden, head, labels).total)

# An untrained model gives every token a log-prob of -log 64 = -4.2 nats. Below -5 a rejected answer stops pushing.
cooling = Cooling(logp_floor=-5.0, temperature=0.5)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
history = []
for _step in range(30):
    out = model(
        tokens,
        lambda hidden, head: linear_cwdpo_loss(
            hidden, head, labels, ref_logp[:PAIRS], ref_logp[PAIRS:], beta=0.1, cooling=cooling
        ),
    )
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    history.append(out)

first, last = history[0], history[-1]
print(f"loss             {first.loss:8.4f} -> {last.loss:8.4f}")
print(f"reward margin    {first.margin.mean():8.4f} -> {last.margin.mean():8.4f}")
print(f"cooling weight   {first.cooling_weight.mean():8.4f} -> {last.cooling_weight.mean():8.4f}")
print(f"rejected, nats   {first.rejected_logp.mean.mean():8.4f} -> {last.rejected_logp.mean.mean():8.4f}  per token")
