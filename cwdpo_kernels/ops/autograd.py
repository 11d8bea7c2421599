"""Derivatives of an op: first-order ones work under all of torch's transforms, the others raise NotImplementedError.

- First order: `backward`, `autograd.grad`, `torch.func.grad`, `vjp`, `jacrev` and `functional_call`, and `vmap` over
  them. With `create_graph=True` the gradient is right; differentiating it again raises.
- Forward mode raises: `torch.func.jvp`, `jacfwd` and `hessian`, and `torch.autograd.forward_ad`.

`torch.library.register_autograd` would make an autograd.Function without `setup_context`, which torch.func refuses, and
would call it only for tensors that require a gradient, so that forward-mode derivatives would silently be zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._ops import add_op_namespace_prefix


def register_first_order(
    op: str, overload: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., tuple]
) -> type[torch.autograd.Function]:
    """Register `backward` (ctx, *grads of the results) as the gradient of `op`. Returns its autograd.Function.

    `backward` runs without grad mode; `ctx.create_graph` says whether its result may be differentiated again.
    """

    class FirstOrder(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return first_derivative(op, backward, ctx, grads)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            refuse_forward_mode(op)

        @staticmethod
        def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
            return one_by_one(FirstOrder.apply, info.batch_size, in_dims, args)

    FirstOrder.setup_context = staticmethod(setup_context)  # type: ignore[method-assign]
    FirstOrder.__name__ = FirstOrder.__qualname__ = op

    def kernel(*args: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        backward_mode = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if backward_mode or any(_has_tangent(tensor) for tensor in tensors):
            if torch._C._are_functorch_transforms_active():
                raise NotImplementedError(
                    f"{op}: torch.func cannot differentiate the registered op. Call the function of cwdpo_kernels."
                )
            return FirstOrder.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    torch.library.impl(add_op_namespace_prefix(op), "Autograd", kernel)
    return FirstOrder


def first_derivative(
    op: str, backward: Callable[..., tuple], ctx: Any, grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """backward(ctx, *grads), whose result cannot be differentiated again: that raises an error with the name `op`."""
    ctx.create_graph = torch.is_grad_enabled()
    if not ctx.create_graph:
        return backward(ctx, *grads)
    with torch.no_grad():
        results = backward(ctx, *grads)
    return FirstDerivative.of(op, results, (*grads, *ctx.saved_tensors))


def refuse_forward_mode(op: str) -> NoReturn:
    raise NotImplementedError(f"{op}: forward-mode derivatives (jvp, jacfwd) are not implemented")


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


class FirstDerivative(torch.autograd.Function):
    """The identity on first derivatives. Differentiating them again raises."""

    @staticmethod
    def of(op: str, results: tuple[Tensor | None, ...], depends_on: tuple[Tensor | None, ...]) -> tuple:
        """`results`, which depend on the tensors `depends_on` in a way that has no derivative here."""
        found = [result for result in results if result is not None]
        guarded = iter(FirstDerivative.apply(op, len(found), *found, *(x for x in depends_on if x is not None)))
        return tuple(None if result is None else next(guarded) for result in results)

    @staticmethod
    def forward(op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(f"{ctx.op}: second derivatives are not implemented")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(f"{ctx.op}: second derivatives are not implemented")

    @staticmethod
    def vmap(info: Any, in_dims: tuple, op: str, count: int, *tensors: Tensor) -> tuple[Any, Any]:
        return FirstDerivative.apply(op, count, *tensors), in_dims[2 : 2 + count]


def register_batching(op: str, name: str, overload: Callable[[], Callable[..., Any]]) -> None:
    """Let vmap call `op` once per element of the batch."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        return one_by_one(overload(), info.batch_size, in_dims, args)

    torch.library.register_vmap(name, rule)


def one_by_one(function: Callable[..., Any], batch_size: int, in_dims: tuple, args: tuple) -> tuple[Any, Any]:
    """Results of `function` for each element of a batch, stacked in dimension 0, and those dimensions."""

    def element(i: int) -> Any:
        pairs = zip(args, in_dims, strict=True)
        return function(*(arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in pairs))

    outputs = [element(i) for i in range(batch_size)]
    if outputs[0] is None:
        return None, None
    if isinstance(outputs[0], Tensor):
        return torch.stack(outputs), 0
    return tuple(torch.stack(each) for each in zip(*outputs, strict=True)), tuple(0 for _ in outputs[0])
