"""Registers and calls ops by argument name, so that a new argument changes only the schema and the kernels.

Torch passes arguments and results by position. The functions here use the schema to map positions to names and back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops
from .autograd import register_batching, register_first_order

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
OPS: list[str] = []  # in the order of their definition
_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}  # of the differentiable ops

Values = dict[str, Any]  # arguments, results and gradients by name


def define(op: str, schema: str) -> None:
    """Declare an op with its schema, in which every argument and every result has a name."""
    torch.library.define(add_op_namespace_prefix(op), schema)
    register_batching(op, add_op_namespace_prefix(op), lambda: getattr(ops, op).default)
    OPS.append(op)


@functools.cache
def arguments(op: str) -> tuple[str, ...]:
    """The names of an op's arguments, in order."""
    return tuple(argument.name for argument in getattr(ops, op).default._schema.arguments)


@functools.cache
def results(op: str) -> tuple[str, ...]:
    """The names of an op's results, in order."""
    return tuple(result.name for result in getattr(ops, op).default._schema.returns)


def call(op: str, values: Mapping[str, Any]) -> Values:
    """Call an op with the `values` that its schema names; return its results by name."""
    output = getattr(ops, op).default(*(values[name] for name in arguments(op)))
    return _named(results(op), output)


def register_fake(op: str) -> Callable[[Callable[..., Any]], None]:
    """Decorate the op's shape function, which gets its arguments by keyword and returns its results in order."""

    def register(function: Callable[..., Any]) -> None:
        def fake(*args: Any) -> Any:
            return function(**dict(zip(arguments(op), args, strict=True)))

        torch.library.register_fake(add_op_namespace_prefix(op), fake)

    return register


def register_autograd(
    op: str, *, differentiable: tuple[str, ...], saves: Callable[[Values], Iterable[str]],
    backward: Callable[[Any, Values], Values],
) -> None:  # fmt: skip
    """Register the gradient of an op. Second derivatives, forward-mode ones and batched graphs: see autograd.py.

    differentiable: the results that have a gradient.
    saves: from the arguments and results to the names of those that backward reads. It may name more (such as all
        arguments of a backward op): only arguments and results are saved.
    backward: (ctx, values) -> {argument: its gradient}; an argument left out has none. `values` holds what was saved,
        `grad_<result>` for each differentiable result (None where no gradient arrived, but never all of them) and
        `needs_<argument>`, whether a gradient is wanted, for each argument.
    """
    names = arguments(op)

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        values = dict(zip(names, inputs, strict=True)) | _named(results(op), output)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(values[name] for name in results(op) if name not in differentiable))
        saved = {name: values[name] for name in saves(values) if name in values}
        ctx.saved_names = [name for name, value in saved.items() if isinstance(value, Tensor)]
        ctx.saved_values = {name: value for name, value in saved.items() if not isinstance(value, Tensor)}
        ctx.save_for_backward(*(saved[name] for name in ctx.saved_names))

    def backward_by_position(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        by_result = dict(zip(results(op), grads, strict=True))
        arrived = {f"grad_{name}": by_result[name] for name in differentiable}
        by_argument: dict[str, Tensor | None] = dict.fromkeys(names)
        if any(grad is not None for grad in arrived.values()):
            needs = {f"needs_{name}": need for name, need in zip(names, ctx.needs_input_grad, strict=True)}
            saved = dict(zip(ctx.saved_names, ctx.saved_tensors, strict=True))
            by_argument |= backward(ctx, ctx.saved_values | saved | arrived | needs)
        return tuple(by_argument[name] for name in names)

    _FUNCTIONS[op] = register_first_order(op, getattr(ops, op).default, setup_context, backward_by_position)


def apply(op: str, **values: Any) -> tuple[Tensor, ...]:
    """Call a differentiable op. Unlike the registered op, this works under the transforms of torch.func."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _FUNCTIONS[op].apply(*(values[name] for name in arguments(op)))
    return getattr(ops, op)(**values)


def _named(names: tuple[str, ...], output: Any) -> Values:
    outputs = output if isinstance(output, (tuple, list)) else () if output is None else (output,)
    return dict(zip(names, outputs, strict=True))
