"""One process of tests/test_vocab_parallel.py: compares a head split over processes with the whole head in float64.

`python vocab_parallel_worker.py rank processes store`, with a file that the processes meet at.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate, Shard, distribute_tensor

import cwdpo_kernels as ck
from cwdpo_kernels import reference
from cwdpo_kernels.compat import cut_cross_entropy, verl
from cwdpo_kernels.testing import as_float64, check_budget, leaves, make_inputs

FIELDS = ("logp", "entropy", "top1_prob", "logsumexp", "log_sum_sq_probs", "mean_logit")
DIFFERENTIABLE = ("logp", "entropy", "logsumexp")


def combination(stats):
    """A number that depends on every field with a gradient, differently for each token."""
    total = 0.0
    for k, name in enumerate(DIFFERENTIABLE, start=1):
        values = getattr(stats, name)
        total = total + (values * torch.linspace(0.5, k, values.numel(), dtype=values.dtype).view_as(values)).sum()
    return total


def part_of(head, rank, processes, uneven, cuts=None):
    """This process's part of a head, as leaves."""
    vocab = head.weight.shape[0]
    cuts = cuts or [round(vocab * ((i / processes) ** (2 if uneven else 1))) for i in range(processes + 1)]
    rows = slice(cuts[rank], cuts[rank + 1])
    weight = head.weight.detach()[rows].clone().requires_grad_()
    bias = None if head.bias is None else head.bias.detach()[rows].clone().requires_grad_()
    return ck.Head(weight, bias, head.scale, head.softcap, ck.VocabShard(None, rows.start, vocab)), rows


def check_statistics(rank, processes):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for options in ({}, {"bias": True, "scale": 0.5, "softcap": 5.0}):
            hidden, head, labels = make_inputs((2, 9), 151, 33, dtype, **options)
            exact = as_float64(hidden, head)
            part, rows = part_of(head, rank, processes, uneven=bool(options))
            budget = ck.MemoryBudget(kept_bytes=4096 if options else None)
            ours = ck.token_stats(hidden, part, labels, budget=budget)
            eager, truth = reference.token_stats(hidden, head, labels), reference.token_stats(*exact, labels)
            for name in FIELDS:
                check_budget(name, getattr(ours, name), getattr(eager, name), getattr(truth, name))
            assert torch.equal(ours.is_top1, truth.is_top1)
            grads = [torch.autograd.grad(combination(stats), inputs) for stats, inputs in (
                (ours, leaves(hidden, part)), (eager, leaves(hidden, head)), (truth, leaves(*exact)),
            )]  # fmt: skip
            check_budget("hidden", *(grad[0] for grad in grads))
            for name, own, *whole in zip(("weight", "bias"), *(grad[1:] for grad in grads), strict=False):
                check_budget(name, own, *(grad[rows] for grad in whole))


def check_empty_parts(rank, processes):
    """A vocabulary with fewer entries than processes, as DTensor splits it, or with an empty part in front."""
    hidden, head, labels = make_inputs((6,), 13, 8, torch.float64, bias=True, labelled=1.0)
    for empty in (0, processes - 1):
        cuts = [0, 0, *[13] * (processes - 1)] if empty == 0 else [0, *[13] * processes]
        part, rows = part_of(head, rank, processes, uneven=False, cuts=cuts)
        check_equal(hidden, head, labels, part, rows)
    hidden, head, labels = make_inputs((6,), 1, 8, torch.float64, labelled=1.0)
    weight = distribute_tensor(head.weight.detach(), DeviceMesh("cpu", list(range(processes))), [Shard(0)])
    stats = ck.token_stats(hidden, weight.requires_grad_(), labels)
    torch.testing.assert_close(stats, ck.token_stats(hidden, head, labels))
    assert torch.autograd.grad(combination(stats), weight)[0].shape == (1, 8)


def check_equal(hidden, head, labels, part, rows, **options):
    """A split head and the whole one give the same statistics and gradients."""
    ours, whole = (ck.token_stats(hidden, each, labels, **options) for each in (part, head))
    torch.testing.assert_close(ours, whole)
    own, full = (torch.autograd.grad(combination(x), leaves(hidden, y)) for x, y in ((ours, part), (whole, head)))
    torch.testing.assert_close(own, (full[0], *(grad[rows] for grad in full[1:])))


def check_ignore_index(rank, processes):
    """It may be the number of an entry: of the whole vocabulary, or counted from a part's start."""
    hidden, head, _ = make_inputs((30,), 30, 8, torch.float64, bias=True)
    part, rows = part_of(head, rank, processes, uneven=True)
    for ignore_index in (5, 20, 29, -1, -10):
        labels = torch.arange(30).index_fill(0, torch.tensor([4]), ignore_index)
        check_equal(hidden, head, labels, part, rows, ignore_index=ignore_index)


def check_transforms(rank, processes):
    """First derivatives under torch.func and create_graph; others raise."""
    hidden, head, labels = make_inputs((6,), 30, 8, torch.float64, labelled=1.0)
    part, _ = part_of(head, rank, processes, uneven=False)
    frozen = ck.Head(part.weight.detach(), shard=part.shard)

    def total(hidden):
        return combination(ck.token_stats(hidden, frozen, labels))

    expected = torch.autograd.grad(total(hidden), hidden, create_graph=True)[0]
    plain = hidden.detach()
    torch.testing.assert_close(torch.func.grad(total)(plain), expected.detach())
    batch = torch.stack([plain, plain * 0.5])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(total))(batch)[0], expected.detach())
    with pytest.raises(NotImplementedError, match="token_stats: second derivatives are not implemented"):
        expected.sum().backward()
    with pytest.raises(NotImplementedError, match="token_stats: forward-mode derivatives"):
        torch.func.jvp(total, (plain,), (plain,))


def check_compiled(rank, processes):
    """In one graph: a part given by `shard`, frozen and trainable, and a DTensor."""
    hidden, head, labels = make_inputs((13,), 61, 20, torch.float64, labelled=1.0)
    part, _ = part_of(head, rank, processes, uneven=False)
    split = distribute_tensor(head.weight.detach(), DeviceMesh("cpu", list(range(processes))), [Shard(0)])
    weights = (part.weight, part.shard), (part.weight.detach(), part.shard), (split.requires_grad_(), None)
    for weight, shard in weights:

        def total(hidden, weight, labels, shard=shard):
            return combination(ck.token_stats(hidden, ck.Head(weight, shard=shard), labels))

        inputs = [x for x in (hidden, weight) if x.requires_grad]
        torch._dynamo.reset()
        compiled = torch.compile(total, fullgraph=True, backend="aot_eager")(hidden, weight, labels)
        expected = total(hidden, weight, labels)
        torch.testing.assert_close(compiled, expected)
        own, eager = torch.autograd.grad(compiled, inputs), torch.autograd.grad(expected, inputs)
        for actual, grad in zip(own, eager, strict=True):
            torch.testing.assert_close(*(x.to_local() if isinstance(x, DTensor) else x for x in (actual, grad)))


def check_loss(rank, processes):
    """A loss of the package on a split head, and a frozen one."""
    hidden, head, labels = make_inputs((4, 7), 61, 20, torch.float64)
    refs = (torch.zeros(2, dtype=torch.float64),) * 2
    options = {"beta": 0.3, "cooling": ck.Cooling()}
    part, rows = part_of(head, rank, processes, uneven=False)
    expected = ck.linear_cwdpo_loss(hidden, head, labels, *refs, **options).loss
    whole = torch.autograd.grad(expected, leaves(hidden, head))
    loss = ck.linear_cwdpo_loss(hidden, part, labels, *refs, **options).loss
    torch.testing.assert_close(loss, expected)
    for own, full in zip(torch.autograd.grad(loss, leaves(hidden, part)), (whole[0], whole[1][rows]), strict=True):
        torch.testing.assert_close(own, full)
    frozen = ck.Head(part.weight.detach(), shard=part.shard)
    loss = ck.linear_cwdpo_loss(hidden, frozen, labels, *refs, **options).loss
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], whole[0])


def check_dtensor(rank, processes):
    """A DTensor says itself which part it is; its gradient is one, too."""
    mesh = DeviceMesh("cpu", list(range(processes)))
    hidden, head, labels = make_inputs((11,), 52, 16, torch.float64, bias=True)
    for placement in (Shard(0), Replicate()):
        weight, bias = (DTensor.from_local(x.detach(), mesh, [Replicate()]).redistribute(placements=[placement])
                        for x in (head.weight, head.bias))  # fmt: skip
        weight, bias = weight.detach().requires_grad_(), bias.detach().requires_grad_()
        loss = combination(ck.token_stats(hidden, ck.Head(weight, bias), labels))
        expected = combination(ck.token_stats(hidden, head, labels))
        torch.testing.assert_close(loss, expected)
        own = torch.autograd.grad(loss, [hidden, weight, bias])
        whole = torch.autograd.grad(expected, leaves(hidden, head))
        torch.testing.assert_close(own[0], whole[0])
        for mine, full in zip(own[1:], whole[1:], strict=True):
            torch.testing.assert_close(mine.full_tensor(), full)


def check_adapters(rank, processes):
    """verl's process group (equal parts; the caller sums the gradient of hidden) and cut-cross-entropy's options."""
    hidden, head, labels = make_inputs((13,), 60, 16, torch.float32, labelled=1.0)
    part, rows = part_of(head, rank, processes, uneven=False)
    upstream = torch.linspace(-1, 1, 13)

    def grads(logp, entropy, inputs):
        return torch.autograd.grad((logp * upstream).sum() + 0.1 * entropy.sum(), inputs)

    found = verl.linear_cross_entropy(hidden, part.weight, labels, 0.7, "none", dist.group.WORLD)
    expected = verl.linear_cross_entropy(hidden, head.weight, labels, 0.7)
    torch.testing.assert_close(found, expected)
    own, whole = grads(*found, [hidden, part.weight]), grads(*expected, [hidden, head.weight])
    dist.all_reduce(own[0])
    torch.testing.assert_close(own, (whole[0], whole[1][rows]))

    for reduce_e_grad in (True, False):
        options = SimpleNamespace(start=rows.start, stop=rows.stop, group=None, reduce_e_grad=reduce_e_grad)
        found = cut_cross_entropy.linear_cross_entropy(
            hidden, part.weight, labels, vocab_parallel_options=options, return_lse=True, reduction="none"
        )
        expected = cut_cross_entropy.linear_cross_entropy(
            hidden, head.weight, labels, return_lse=True, reduction="none"
        )
        torch.testing.assert_close(found, expected)
        own, whole = grads(*found, [hidden, part.weight]), grads(*expected, [hidden, head.weight])
        if not reduce_e_grad:
            dist.all_reduce(own[0])
        torch.testing.assert_close(own, (whole[0], whole[1][rows]))


def check_refusals(rank, processes):
    hidden, head, labels = make_inputs((6,), 30, 8, labelled=1.0)
    part, _ = part_of(head, rank, processes, uneven=False)
    with pytest.raises(ValueError, match="expected labels to have values the same in all processes"):
        ck.linear_logprob(hidden, part, (labels + rank) % 30)
    with pytest.raises(NotImplementedError, match="head_p split over processes is not supported"):
        ck.token_divergence(hidden, part, hidden, head)
    with pytest.raises(ValueError, match=r"expected labels to have values in \[0, 30\)"):
        ck.linear_logprob(hidden, part, labels + 30)
    count = 6 - rank
    with pytest.raises(ValueError, match=r"expected labels to have number of tokens the same .* got \[6, 5"):
        ck.linear_logprob(hidden[:count], part, labels[:count])
    overlapping = ck.Head(head.weight[:20], shard=ck.VocabShard(None, min(rank, 1) * 10, 30))
    with pytest.raises(ValueError, match=r"expected head.shard to have parts that cover \[0, 30\) without overlap"):
        ck.linear_logprob(hidden, overlapping, labels)
    mesh = DeviceMesh("cpu", list(range(processes)))
    whole = [DTensor.from_local(x.detach(), mesh, [Replicate()]) for x in (head.weight, head.weight[:, 0])]
    with pytest.raises(ValueError, match=r"expected head.bias to have type Tensor \(as head.weight\), got DTensor"):
        ck.linear_logprob(hidden, ck.Head(head.weight, whole[1]), labels)
    with pytest.raises(ValueError, match=r"expected head\.shard to have value None"):
        ck.linear_logprob(hidden, ck.Head(whole[0], shard=part.shard), labels)
    replicated = DTensor.from_local(hidden, mesh, [Replicate()])
    torch.testing.assert_close(ck.linear_logprob(replicated, head, labels), ck.linear_logprob(hidden, head, labels))


CHECKS = (
    check_statistics, check_empty_parts, check_ignore_index, check_transforms, check_compiled, check_loss,
    check_dtensor, check_adapters, check_refusals,
)  # fmt: skip


def main() -> None:
    rank, processes, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    for check in CHECKS:
        check(rank, processes)
        print(check.__name__, flush=True)
    dist.destroy_process_group()


main()
