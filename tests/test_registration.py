"""Every op passes opcheck; the public functions compile without graph breaks; every device's backend has a name."""

import pytest
import torch

import cwdpo_kernels as ck
from cwdpo_kernels import ops
from cwdpo_kernels.ops import registry
from cwdpo_kernels.preference import DPO
from cwdpo_kernels.testing import make_inputs

OPS = torch.ops.cwdpo
CU = torch.arange(5) * 3
# From 2.15 on, torch reads .grad of non-leaf tensors inside opcheck and hides its own warning in a way that does not
# work when warnings are errors.
ignore_warning_of_opcheck = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def op_cases():
    hidden, head, labels = make_inputs((12,), 37, 8, bias=True)
    linear = (hidden, head.weight, head.bias, labels, 0.5, 4.0, -100)
    frozen = (hidden, head.weight.detach(), None, labels, 1.0, None, -100)
    logp, anchor, sum_exp, _, kept = OPS.linear_logprob(*linear, False, True, 1 << 20, 600)
    saved = (torch.ones(12), *(x.detach() for x in linear[:3]), labels, logp.detach(), anchor, sum_exp)
    backward = (*saved, kept, *linear[4:], True, True, True, True, 1 << 20)
    backward_ = (*saved, torch.empty_like(saved[2]), *linear[4:], True, True, True, 1 << 20)
    logits = torch.randn(12, 37, requires_grad=True)
    logits_odds = tuple(x.detach() for x in OPS.logits_logprob(logits, labels, -100, False))
    gradient = (torch.ones(12), logits.detach(), labels, *logits_odds, -100)
    token = torch.randn(12).neg().requires_grad_()
    refs = (torch.zeros(2), torch.zeros(2))
    count = torch.tensor([3, 3, 0, 3])
    cooling = (0.1, -3.0, 1.0, None, -9.0, False, -100)
    detached = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in linear)
    sums, _, kept_logits = OPS.softmax_sums(*detached, False, False, 1 << 20, 600)
    factors = (torch.randn(12), torch.randn(12), torch.randn(12), *detached[:4], sums[1])
    return [
        ("linear_logprob", (*linear, False, False, 1 << 20, 600)),
        ("linear_logprob", (*frozen, True, False, 1 << 20, 0)),
        ("linear_logprob_backward", backward),
        ("linear_logprob_backward_", backward_),
        ("logits_logprob", (logits, labels, -100, False)),
        ("logits_logprob_backward", gradient),
        ("logits_logprob_backward_", gradient),
        ("token_stats", (*linear, False, 1 << 20, 600)),
        ("token_stats", (*frozen, True, 1 << 20, 0)),
        ("softmax_sums", (*detached, False, False, 1 << 20, 600)),
        ("softmax_sums", (*detached, True, False, 1 << 20, 0)),
        ("softmax_sums", (*detached, False, True, 1 << 20, 0)),
        ("softmax_sums_backward", (*factors, kept_logits, *linear[4:], False, True, True, True, 1 << 20)),
        ("softmax_sums_backward_", (*factors, torch.empty_like(saved[2]), *linear[4:], False, True, True, 1 << 20)),
        ("token_divergence", (*detached[:3], 1.0, None, *detached[:3], 0.5, None, 1 << 20)),
        ("cooling_weight", (torch.randn(4), -3.0, 1.0, None)),
        ("sequence_logprob", (token, labels, CU, -100)),
        ("sequence_logprob_backward", (torch.ones(4), torch.ones(4), labels, count, CU, -100)),
        ("cwdpo_loss", (token, labels, None, CU, *refs, *cooling)),
        ("cwdpo_loss", (token[:4].detach().requires_grad_(), None, count, torch.arange(5), *refs, *cooling)),
        ("constrained_sft_loss", (token, labels, None, CU, 0.1, 5.0, "hinge", True, -100)),
    ]


CASES = op_cases()


@ignore_warning_of_opcheck
@pytest.mark.plain_tensors  # opcheck makes fake tensors of them
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("name", "args"), CASES, ids=[name for name, _ in CASES])
def test_opcheck(name, args):
    torch.library.opcheck(getattr(OPS, name).default, args)


@ignore_warning_of_opcheck
@pytest.mark.plain_tensors  # opcheck makes fake tensors of them
@pytest.mark.usefixtures("backend")
def test_opcheck_of_tiles_kept_in_the_memory_of_the_gradient():
    torch.library.opcheck(OPS.linear_logprob.default, (*CASES[0][1][:-1], None))


def test_every_op_is_checked():
    names = {
        schema.name.removeprefix("cwdpo::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("cwdpo::")
    }
    assert names == {name for name, _ in CASES}


def public_calls():
    hidden, head, labels = make_inputs((4, 3), 37, 8)
    weight, refs = head.weight, (torch.zeros(2), torch.zeros(2))
    dpo = {"beta": 0.1, "cooling": ck.Cooling()}
    negatives = ck.GentleNegatives(nll_floor=9.0)
    other = torch.randn(4, 3, 8)

    def sequences(h):
        out = ck.linear_sequence_logprob(h, weight, labels)
        return ck.SequenceLogprob(*(x[:2] for x in out)), ck.SequenceLogprob(*(x[2:] for x in out))

    return {
        "linear_logprob": lambda h: ck.linear_logprob(h, ck.Head(weight, softcap=5.0), labels).sum(),
        "linear_logprob-frozen": lambda h: ck.linear_logprob(h, weight.detach(), labels).sum(),
        "logits_logprob": lambda h: ck.logits_logprob(h @ weight.T, labels).sum(),
        "linear_sequence_logprob": lambda h: ck.linear_sequence_logprob(h, weight, labels).mean.sum(),
        "logits_sequence_logprob": lambda h: ck.logits_sequence_logprob(h @ weight.T, labels).total.sum(),
        "linear_cwdpo_loss": lambda h: ck.linear_cwdpo_loss(h, weight, labels, *refs, **dpo).loss,
        "logits_cwdpo_loss": lambda h: ck.logits_cwdpo_loss(h @ weight.T, labels, *refs, **dpo).loss,
        "cwdpo_loss": lambda h: ck.cwdpo_loss(*sequences(h), *refs, **dpo).loss,
        "linear_preference_loss": lambda h: ck.linear_preference_loss(h, weight, labels, *refs, loss=DPO()).loss,
        "preference_loss": lambda h: ck.preference_loss(*sequences(h), *refs, loss=DPO()).loss,
        "linear_constrained_sft_loss": lambda h: (
            ck.linear_constrained_sft_loss(h, weight, labels, negatives=negatives).loss
        ),
        "constrained_sft_loss": lambda h: ck.constrained_sft_loss(*sequences(h), negatives=negatives).loss,
        "token_stats": lambda h: sum(x.sum() for x in ck.token_stats(h, weight, labels)[:2]),
        "token_divergence": lambda h: ck.token_divergence(h, weight, other, weight).js.sum() + h.sum(),
        "cooling_weight": lambda h: ck.cooling_weight(h[:, 0, 0], ck.Cooling()).sum() + h.sum(),
        "shift_labels": lambda h: ck.linear_logprob(h, weight, ck.shift_labels(labels)).sum(),
    }, hidden


CALLS, HIDDEN = public_calls()


@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_graph_breaks(name):
    torch._dynamo.reset()
    function = CALLS[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager_loss, compiled_loss = function(HIDDEN), compiled(HIDDEN)
    torch.testing.assert_close(compiled_loss, eager_loss)
    grads = (torch.autograd.grad(loss, HIDDEN, retain_graph=True)[0] for loss in (eager_loss, compiled_loss))
    torch.testing.assert_close(*grads)


def test_compiles_with_inductor_and_dynamic_shapes():
    torch._dynamo.reset()
    options = {"beta": 0.1, "cooling": ck.Cooling()}

    def function(hidden, weight, labels):
        return ck.linear_cwdpo_loss(hidden, weight, labels, torch.zeros(2), torch.zeros(2), **options).loss

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for tokens in (5, 9):
        hidden, head, labels = make_inputs((4, tokens), 37, 8)
        eager = function(hidden, head.weight, labels)
        loss = compiled(hidden, head.weight, labels)
        torch.testing.assert_close(loss, eager)
        grads = (torch.autograd.grad(x, [hidden, head.weight]) for x in (loss, eager))
        for actual, expected in zip(*grads, strict=True):
            torch.testing.assert_close(actual, expected)


def test_one_call_registers_a_backend(monkeypatch):
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    reason = "no driver: install one"
    ops.register_backend("new", "xpu", lambda: reason, workspace_bytes=lambda: 1 << 20, compiled=True)
    assert ck.backend("xpu") == "portable"
    assert ck.missing_backend("xpu") == reason
    with pytest.raises(RuntimeError, match=f"expected the backend new on xpu, got none: {reason}"):
        ops.forced("xpu", "new").__enter__()
    ops.register_backend("new", "xpu", lambda: None, workspace_bytes=lambda: 1 << 20, compiled=True)
    assert ck.backend("xpu") == "new"
    assert ck.missing_backend("xpu") is None
    assert ck.default_workspace_bytes("xpu") == 1 << 20


def test_backends_report_their_workspace():
    assert ck.default_workspace_bytes("cuda") > ck.default_workspace_bytes("meta") > 0
    with ops.forced("cpu", "portable"):
        assert ck.default_workspace_bytes("cpu") == ck.default_workspace_bytes("meta")


def test_backend_names():
    assert ck.backend("cpu") == ("portable" if ck.missing_backend("cpu") else "csrc")
    assert ck.backend(torch.device("meta")) == "portable"
    with pytest.raises(RuntimeError):
        ck.backend("abacus")


def test_options_may_change_between_calls_of_a_compiled_graph():
    """A compiler passes them as symbolic values. The checks of options must accept those."""

    def loss(hidden, weight, labels, refs, beta, ignore_index):
        options = {"beta": beta, "cooling": ck.Cooling(), "ignore_index": ignore_index}
        return ck.linear_cwdpo_loss(hidden, weight, labels, refs, refs, **options).loss

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="eager")
    tensors = torch.randn(4, 3, 8), torch.randn(11, 8), torch.randint(11, (4, 3)), torch.randn(2)
    for beta, ignore_index in ((0.1, -100), (0.2, -7), (0.3, 4)):
        torch.testing.assert_close(compiled(*tensors, beta, ignore_index), loss(*tensors, beta, ignore_index))
