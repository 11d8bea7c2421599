"""Ops called below the public functions, directly and from compiled graphs: wrong arguments raise."""

import pytest
import torch

import cwdpo_kernels as ck
from cwdpo_kernels.testing import make_inputs

OPS = torch.ops.cwdpo
N, V, D = 6, 11, 8
REFUSED = (ValueError, RuntimeError)  # csrc raises RuntimeError


WRONG_OFFSETS = [(0, 10**8), (0, 100), (0, 3), (1, N), (0, 5, 2, N), (-1, N), (0, -5, N), (0, 2**40, N), (0, N - 1)]


def paired(values):
    """The same first and last offset, for an even number of sequences."""
    return torch.tensor([values[0], *values] if len(values) % 2 == 0 else values)


@pytest.fixture
def checked_values(backend):
    """On a GPU, reading offsets before the launch would sync it: there they give NaN (tests/test_offsets.py)."""
    if torch.get_default_device().type == "cuda":
        pytest.skip("values are not read on a GPU")


@pytest.mark.usefixtures("checked_values")
@pytest.mark.parametrize("values", WRONG_OFFSETS, ids=str)
def test_wrong_offsets(values):
    logp, labels, ref = -torch.rand(N), torch.arange(N), torch.zeros(1)
    calls = [
        lambda: OPS.sequence_logprob(logp, labels, torch.tensor(values), -100),
        lambda: OPS.sequence_logprob_backward(
            torch.ones(len(values) - 1), torch.ones(len(values) - 1), labels,
            torch.ones(len(values) - 1, dtype=torch.long), torch.tensor(values), -100,
        ),
        lambda: OPS.cwdpo_loss(
            logp, labels, None, paired(values), ref, ref, 0.1, -3.0, 1.0, None, None, False, -100
        ),
        lambda: OPS.constrained_sft_loss(logp, labels, None, paired(values), 0.1, 3.0, "hinge", True, -100),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(REFUSED, match="expected cu_seqlens to have"):
            call()


@pytest.mark.usefixtures("checked_values")
def test_wrong_offsets_in_a_compiled_graph():
    hidden, head, labels = make_inputs((64,), V, D)
    negatives = ck.GentleNegatives()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss(hidden, weight, labels, cu_seqlens):
        return ck.linear_constrained_sft_loss(hidden, weight, labels, negatives=negatives, cu_seqlens=cu_seqlens).loss

    with pytest.raises(REFUSED, match="expected cu_seqlens to have"):
        loss(hidden, head.weight, labels, torch.tensor([0, 32, 10**8]))


def linear(**changes):
    arguments = {
        "hidden": torch.randn(N, D), "weight": torch.randn(V, D), "bias": torch.zeros(V), "labels": torch.arange(N),
        "scale": 1.0, "softcap": None, "ignore_index": -100, "with_direction": False, "sparse_grad": False,
        "workspace_bytes": 0, "kept_bytes": 0,
    }  # fmt: skip
    return OPS.linear_logprob(**arguments | changes)


def described(changes):
    """The changed arguments, tensors by their shape: an id must be the same in every process."""
    shown = {name: list(x.shape) if isinstance(x, torch.Tensor) else x for name, x in changes.items()}
    return ", ".join(f"{name} {x}" for name, x in shown.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": torch.arange(N + 1)}, {"labels": torch.arange(N).float()}, {"labels": torch.zeros(N, 0).long()},
        {"weight": torch.randn(V, D + 1)}, {"weight": torch.randn(V, D).double()}, {"weight": torch.randn(V)},
        {"bias": torch.zeros(V - 1)}, {"bias": torch.zeros(V, 0)}, {"hidden": torch.randn(N - 1, D)},
        {"hidden": torch.zeros(N, D, dtype=torch.int64)}, {"hidden": torch.zeros(N, 0), "weight": torch.zeros(V, 0)},
        {"softcap": 1e-46}, {"softcap": -1.0}, {"workspace_bytes": -1}, {"kept_bytes": -2}, {"kept_bytes": 2**62},
    ],
    ids=described,
)  # fmt: skip
def test_wrong_arguments_of_linear_logprob(changes):
    device = torch.empty(0).device
    changes = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in changes.items()}
    with pytest.raises(REFUSED):
        linear(**changes)


@pytest.mark.parametrize("added", [V, -1, 2**32])
def test_labels_outside_the_vocabulary(added):
    """A GPU gives them NaN: reading labels before the launch would sync it."""
    labels = torch.arange(N) + added
    if labels.is_cuda:
        logp, *_ = linear(labels=labels)
        assert logp.isnan().tolist() == [not 0 <= label < V for label in labels.tolist()]
    else:
        with pytest.raises(REFUSED, match="expected labels to have"):
            linear(labels=labels)


@pytest.mark.parametrize("name", ["grad_logp", "logp", "anchor", "sum_exp", "kept"])
def test_wrong_arguments_of_the_backward_ops(name):
    hidden, weight, labels, logits = torch.randn(N, D), torch.randn(V, D), torch.arange(N), torch.randn(N, V)
    one = torch.ones(N)
    wrong = torch.ones(1).expand(4, 100) if name == "kept" else torch.ones(N, 0)
    saved = {"grad_logp": one, "logp": -one, "anchor": one, "sum_exp": one, "kept": torch.zeros(0, dtype=torch.uint8)}
    options = {
        "scale": 1.0, "softcap": None, "ignore_index": -100, "needs_hidden": True, "needs_bias": False,
        "sparse_grad": False, "workspace_bytes": 0,
    }  # fmt: skip
    head = {"hidden": hidden, "weight": weight, "bias": None, "labels": labels}
    with pytest.raises(REFUSED):
        OPS.linear_logprob_backward(**head, **saved | {name: wrong}, **options, needs_weight=True)
    with pytest.raises(REFUSED):
        OPS.linear_logprob_backward_(**head, **saved | {name: wrong}, **options)
    if name != "kept":
        del saved["kept"]
        for op in (OPS.logits_logprob_backward, OPS.logits_logprob_backward_):
            with pytest.raises(REFUSED):
                op(logits=logits, labels=labels, ignore_index=-100, **saved | {name: wrong})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_without_a_vocabulary(dtype):
    with pytest.raises(REFUSED, match="V"):
        OPS.logits_logprob(torch.zeros(3, 0, dtype=dtype), torch.full((3,), -100), -100, False)


def test_tokens_outside_rows_do_not_count():
    hidden, head, labels = make_inputs((4, 6), 50, 12, labelled=1.0)
    rows = torch.arange(0, 24, 2)
    kept = torch.full_like(labels, -100).flatten().index_copy(0, rows, labels.flatten()[rows]).view(4, 6)
    ours, truth = (
        ck.linear_sequence_logprob(hidden, head, labels, rows=rows), ck.linear_sequence_logprob(hidden, head, kept)
    )  # fmt: skip
    assert ours.count.tolist() == [3, 3, 3, 3]
    for actual, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(actual, expected)
    ref, options = torch.full((2,), -9.0), {"beta": 0.1, "cooling": ck.Cooling()}
    ours = ck.linear_cwdpo_loss(hidden, head, labels, ref, ref, rows=rows, **options)
    truth = ck.linear_cwdpo_loss(hidden, head, kept, ref, ref, **options)
    torch.testing.assert_close(ours.cooling_weight, truth.cooling_weight)
    torch.testing.assert_close(ours.loss, truth.loss)
    for mode in ("hinge", "hard", "smoothed"):
        negatives = ck.GentleNegatives(mode=mode, nll_floor=50.0)
        ours = ck.linear_constrained_sft_loss(hidden, head, labels, negatives=negatives, rows=rows)
        truth = ck.linear_constrained_sft_loss(hidden, head, kept, negatives=negatives)
        torch.testing.assert_close(ours.loss, truth.loss)


def test_rows_given_twice_are_refused():
    """Their gradient would be wrong: d logp / d hidden would count twice."""
    hidden, head, labels = make_inputs((4, 6), 50, 12, labelled=1.0)
    if hidden.is_cuda:
        pytest.skip("reading them would sync the device")
    with pytest.raises(ValueError, match="expected rows to have values all different, got 5 2 times"):
        ck.linear_logprob(hidden, head, labels, rows=torch.tensor([3, 5, 1, 5]))


@pytest.mark.parametrize("rows", [[0, 24], [0, 10**8], [-25, 1]], ids=str)
def test_wrong_rows_in_a_compiled_graph(rows):
    hidden, head, labels = make_inputs((4, 6), 50, 12)
    compiled = torch.compile(ck.linear_sequence_logprob, backend="aot_eager", fullgraph=True)
    if hidden.is_cuda:
        pytest.skip("torch's own device assert would make the process lose its GPU")
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
        compiled(hidden, head.weight, labels, rows=torch.tensor(rows))


def sums_backward(op, **changes):
    one = torch.ones(N)
    arguments = {
        "grad_target": one, "exp_factor": one, "log_factor": one, "hidden": torch.randn(N, D),
        "weight": torch.randn(V, D), "bias": None, "labels": torch.arange(N), "max_logit": one,
        "kept": torch.zeros(V, D), "scale": 1.0, "softcap": None, "ignore_index": -100, "partial": False,
        "needs_hidden": True, "needs_weight": True, "needs_bias": False, "workspace_bytes": 0,
    }  # fmt: skip
    if op.endswith("_"):
        del arguments["needs_weight"]
    return getattr(OPS, op)(**arguments | changes)


@pytest.mark.parametrize("name", ["grad_target", "exp_factor", "log_factor", "max_logit", "labels", "kept"])
@pytest.mark.parametrize("op", ["softmax_sums_backward", "softmax_sums_backward_"])
def test_wrong_arguments_of_softmax_sums_backward(op, name):
    one = torch.ones(N)
    wrong = [torch.ones(N + 1), torch.ones(N, 0), torch.ones(1, N), one.double(), one.int(), one.bfloat16()]
    wrong = {"labels": [one, torch.arange(N + 1)], "kept": [torch.ones(1).expand(V, D)]}.get(name, wrong)
    for value in wrong:
        with pytest.raises(REFUSED, match=f"{op}: expected {name} to have"):
            sums_backward(op, **{name: value})


@pytest.mark.parametrize("partial", [False, True])
def test_softmax_sums_needs_a_vocabulary(partial):
    """A process without entries does not call it (see _vocab_parallel.py)."""
    weight, labels = torch.zeros(0, D), torch.arange(N) if partial else torch.full((N,), -100)
    with pytest.raises(REFUSED, match="softmax_sums: expected weight to have V >= 1, got 0"):
        OPS.softmax_sums(torch.randn(N, D), weight, None, labels, 1.0, None, -100, partial, False, 0, 0)


def test_softmax_sums_has_no_direction_of_a_part():
    arguments = (torch.randn(N, D), torch.randn(V, D), None, torch.arange(N), 1.0, None, -100, True, True, 0, 0)
    with pytest.raises(
        REFUSED, match="softmax_sums: expected with_direction to have value False with partial, got True"
    ):
        OPS.softmax_sums(*arguments)


@pytest.mark.parametrize("op", ["linear_logprob", "token_stats"])
def test_a_trainable_head_has_no_direction(op):
    head = (torch.randn(N, D), torch.randn(V, D).requires_grad_(), None, torch.arange(N), 1.0, None, -100)
    options = (True, False, 0, 0) if op == "linear_logprob" else (True, 0, 0)
    with pytest.raises(REFUSED, match=f"{op}: expected with_direction to have value False .weight requires"):
        getattr(OPS, op)(*head, *options)
    with torch.no_grad():
        getattr(OPS, op)(*head, *options)
