"""First derivatives are right under every transform of torch. Second and forward-mode ones raise, by name."""

import sys

import pytest
import torch
from torch.autograd import forward_ad

import cwdpo_kernels as ck
from cwdpo_kernels.compat import cut_cross_entropy, torch_nn

LABELS = torch.tensor([[3, -100, 7], [1, 0, 18], [5, 5, -100], [2, 9, 4]])
REFERENCES = torch.tensor([[-5.0, -6.0], [-7.0, -4.0]])
COOLING = ck.Cooling(logp_floor=-3.0, temperature=1.0)


def labels():
    return LABELS.to(torch.get_default_device())


def cwdpo(hidden, weight):
    refs = REFERENCES.to(hidden)
    return ck.linear_cwdpo_loss(hidden, weight, labels(), *refs, beta=0.1, cooling=COOLING).loss


def gentle(mode):
    negatives = ck.GentleNegatives(weight=0.5, nll_floor=9.0, mode=mode)
    return lambda hidden, weight: ck.linear_constrained_sft_loss(hidden, weight, labels(), negatives=negatives).loss


def logits(function):
    """`function` of logits, as a function of hidden and weight."""
    return lambda hidden, weight: function(hidden @ weight.T)


# hidden [4, 3, D], weight [V, D] -> scalar
FUNCTIONS = {
    "linear_logprob": lambda hidden, weight: ck.linear_logprob(hidden, weight, labels()).sum(),
    "token_stats": lambda hidden, weight: sum(
        getattr(ck.token_stats(hidden, weight, labels()), name).sum() for name in ("logp", "entropy", "logsumexp")
    ),
    "logits_logprob": logits(lambda z: ck.logits_logprob(z, labels()).sum()),
    "sequence_logprob": lambda hidden, weight: ck.linear_sequence_logprob(hidden, weight, labels()).mean.sum(),
    "cwdpo_loss": cwdpo,
    "constrained_sft_loss": gentle("hinge"),
    "constrained_sft_loss, hard": gentle("hard"),
    "constrained_sft_loss, smoothed": gentle("smoothed"),
    "torch's linear_cross_entropy": lambda h, w: torch_nn.linear_cross_entropy(h.flatten(0, 1), w, labels().flatten()),
    "cut-cross-entropy": lambda hidden, weight: cut_cross_entropy.linear_cross_entropy(hidden, weight, labels()),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


@pytest.fixture
def inputs(exact_dtype):
    generator = torch.Generator("cpu").manual_seed(0)

    def leaf(*shape):
        values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return values.to(torch.get_default_device(), exact_dtype).requires_grad_()

    return leaf(4, 3, 8), leaf(20, 8)


def detached(inputs):
    return tuple(x.detach() for x in inputs)


@pytest.mark.plain_tensors
@every_function
def test_torch_func_gives_the_gradient_of_autograd(function, inputs, close):
    expected = torch.autograd.grad(function(*inputs), inputs)
    for actual, truth in zip(torch.func.grad(function, argnums=(0, 1))(*detached(inputs)), expected, strict=True):
        close(actual, truth)
    frozen, weight = detached(inputs)
    close(torch.func.grad(function)(frozen, weight), torch.autograd.grad(function(inputs[0], weight), inputs[0])[0])


@pytest.mark.plain_tensors
@every_function
def test_vmap_over_a_gradient(function, inputs, close):
    hidden, weight = detached(inputs)
    batch = torch.stack([hidden, hidden.flip(0)])
    grads = torch.func.vmap(torch.func.grad(function, argnums=(0, 1)), in_dims=(0, None))(batch, weight)
    for i in range(2):
        one = torch.func.grad(function, argnums=(0, 1))(batch[i], weight)
        for actual, truth in zip(grads, one, strict=True):
            close(actual[i], truth)


@pytest.mark.plain_tensors
@every_function
def test_gradients_per_sample(function, inputs, close, monkeypatch):
    """vmap over hidden and labels, which differ in the number of ignored tokens, with one head for all."""
    hidden, weight = detached(inputs)
    batch, samples = torch.stack([hidden, hidden.flip(0)]), torch.stack([labels(), labels().flip(1)])
    samples[1, 0] = ck.IGNORE_INDEX

    def sample(hidden, labels, weight):
        monkeypatch.setattr(sys.modules[__name__], "LABELS", labels)
        return function(hidden, weight)

    gradients = torch.func.grad(sample, argnums=(0, 2))
    together = torch.func.vmap(gradients, in_dims=(0, 0, None))(batch, samples, weight)
    for i in range(2):
        for actual, truth in zip(together, gradients(batch[i], samples[i], weight), strict=True):
            close(actual[i], truth)


@pytest.mark.plain_tensors
def test_jacobian_of_every_token(inputs, close):
    def logp(hidden, weight):
        return ck.linear_logprob(hidden, weight, labels())[:2, 0]

    jacobians = torch.func.jacrev(logp, argnums=(0, 1))(*detached(inputs))
    values = logp(*inputs)
    for i in range(2):
        expected = torch.autograd.grad(values[i], inputs, retain_graph=True)
        for actual, truth in zip(jacobians, expected, strict=True):
            close(actual[i], truth)


@pytest.mark.plain_tensors
def test_functional_call(inputs, close):
    hidden, weight = detached(inputs)
    head = torch.nn.Linear(8, 20, bias=False)
    head.requires_grad_(False)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, hidden):
            return ck.linear_logprob(hidden, self.head.weight, labels()).sum()

    model = Model()
    grads = torch.func.grad(lambda x: torch.func.functional_call(model, x, (hidden,)))({"head.weight": weight})
    close(grads["head.weight"], torch.autograd.grad(FUNCTIONS["linear_logprob"](hidden, inputs[1]), inputs[1])[0])


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@every_function
def test_a_differentiated_gradient_is_right_and_raises_when_it_is_differentiated(function, frozen, inputs, close):
    hidden, weight = inputs
    wanted = (hidden,) if frozen else inputs
    weight = weight.detach() if frozen else weight
    expected = torch.autograd.grad(function(hidden, weight), wanted)
    grads = torch.autograd.grad(function(hidden, weight), wanted, create_graph=True)
    for actual, truth in zip(grads, expected, strict=True):
        close(actual, truth)
    for grad in grads:
        with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
            torch.autograd.grad(grad.pow(2).sum(), hidden, retain_graph=True)


def test_reused_logits_whose_gradient_is_differentiated(inputs, close):
    z = torch.randn(12, 20, dtype=inputs[0].dtype, requires_grad=True)
    expected = torch.autograd.grad(ck.logits_logprob(z, labels().flatten()).sum(), z)[0]
    reused = z * 1
    logp = ck.logits_logprob(reused, labels().flatten(), reuse_logits=True)
    grad = torch.autograd.grad(logp.sum(), z, create_graph=True)[0]
    close(grad, expected)
    with pytest.raises(NotImplementedError, match="logits_logprob: second derivatives"):
        grad.pow(2).sum().backward()


@pytest.mark.plain_tensors
@every_function
def test_forward_mode_raises(function, inputs):
    hidden, weight = detached(inputs)
    for forward_mode in (
        lambda: torch.func.jvp(function, (hidden, weight), (hidden, weight)),
        lambda: torch.func.jacfwd(function)(hidden, weight),
        lambda: torch.func.hessian(function)(hidden, weight),
        lambda: torch.func.grad(lambda x: torch.func.grad(function)(x, weight).sum())(hidden),
    ):
        with pytest.raises(NotImplementedError, match=r"derivatives.* are not implemented"):
            forward_mode()
    for tracked in ((hidden, weight), inputs):  # with and without tensors that require a gradient
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode derivatives"):
            function(forward_ad.make_dual(tracked[0], hidden), tracked[1])


@pytest.mark.plain_tensors
def test_torch_func_refuses_the_registered_op(inputs):
    hidden, weight = detached(inputs)

    def logp(hidden):
        arguments = (weight, None, labels().flatten(), 1.0, None, -100, True, False, 0, 0)
        return torch.ops.cwdpo.linear_logprob(hidden.flatten(0, 1), *arguments)[0].sum()

    with pytest.raises(
        NotImplementedError, match=r"linear_logprob: torch\.func cannot differentiate the registered op"
    ):
        torch.func.grad(logp)(hidden)


def test_a_compiled_function_raises_for_second_derivatives(backend, inputs):
    if backend == "triton":
        pytest.skip("compiled graphs do not run the interpreter's kernels any differently")
    hidden, aligned = inputs[0], labels()
    weight = inputs[1].detach()

    def penalty(logp):
        grad = torch.autograd.grad(logp.sum(), hidden, create_graph=True)[0]
        grad.pow(2).sum().backward()

    compiled = torch.compile(lambda hidden: ck.linear_logprob(hidden, weight, aligned), backend="aot_eager")
    # "does not require grad": torch 2.11 does not connect the gradient of a compiled graph.
    expected = r"create_graph|double backward|second derivatives|does not require grad"
    with pytest.raises((RuntimeError, NotImplementedError), match=expected):
        penalty(compiled(hidden))
