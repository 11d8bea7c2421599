"""Chat templates with limits. A template comes with a model and is a program: it may loop forever, or fill the memory.

transformers renders templates in Jinja's sandbox, which keeps them from files and from Python, but sets no limit apart
from the length of one range. Importing this module gives transformers a sandbox that counts steps. Steps are counted
rather than seconds, so that a template fails in every process, thread and worker, and on any machine, at the same
place.

- A step is an iteration, a call, a filter or an operator; so are each `CHARACTERS` characters or items of a result.
- An operation is refused before it starts if its result could be larger than `LARGEST`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import _PassArg, pass_context
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

from cwdpo_trainer.errors import InputError, describe

STEPS = 300_000  # per text, about a second; most templates take some hundreds
CHARACTERS = 500  # or items, per step
LARGEST = 200_000_000  # characters or items that one operation may make
LARGEST_POWER = 10_000  # bits of a product or power of integers
# Names that no template can contain.
COUNTED, SIZED = "counted loop", "sized text"
# Methods of texts, and filters, whose result may be as large as the product of their arguments.
MULTIPLYING = {
    "batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "replace", "rjust", "slice",
    "sum", "tojson", "translate", "wordwrap", "zfill",
}  # fmt: skip
# A width of 6 digits, or one that an argument gives.
WIDE_PERCENT, WIDE_BRACES = re.compile(r"%[^a-zA-Z%]*(\*|\d{6})"), re.compile(r"\{[^}]*\d{6}")


class TemplateLimit(SecurityError):
    """A template that takes too long or makes too much text."""


class _Budget:
    """The steps that are left for a text."""

    def __init__(self) -> None:
        self.left = float(STEPS)

    def spend(self, steps: float) -> None:
        self.left -= steps
        if self.left < 0:
            raise TemplateLimit(f"it takes more than {STEPS} steps: does it loop forever?")

    def allow(self, size: float) -> None:
        """Raise if an operation would make a result of `size`."""
        if size > LARGEST:
            raise TemplateLimit(f"it makes a text or list of more than {LARGEST} characters or items")

    def allow_format(self, text: Any, wide: re.Pattern[str]) -> None:
        if isinstance(text, str) and wide.search(text):
            raise TemplateLimit("it formats a text with a width of more than 5 digits")

    def result(self, value: Any) -> Any:
        """`value`, after spending the steps of making it."""
        self.spend(1 + _length(value) / CHARACTERS)
        return value

    def weigh(self, value: Any) -> float:
        """The characters and items of an argument, at any depth; a number counts as itself."""
        if isinstance(value, int | float):
            return max(1.0, abs(value)) if abs(value) < LARGEST else math.inf
        return self._weigh(value)

    def _weigh(self, value: Any) -> float:
        if isinstance(value, str):
            return max(1, len(value))
        if not isinstance(value, list | tuple | dict | set):
            return max(1, _length(value))
        self.spend(len(value) / CHARACTERS)
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return 1 + sum(map(self._weigh, parts))


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict | set | range) else 0


class _Context(Context):
    """The variables of one text, with its budget."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.budget = _Budget()

    def derived(self, *args: Any, **options: Any) -> Context:
        context: Any = super().derived(*args, **options)
        context.budget = self.budget
        return context


class _Filters(dict[str, Callable[..., Any]]):
    """Filters by name, each of which spends steps."""

    def __init__(self, filters: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__()
        for name, function in filters.items():
            self[name] = function

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        super().__setitem__(name, function if name in (COUNTED, SIZED) else _spending(name, function))


def _spending(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    wanted = _PassArg.from_obj(function)
    first = {
        None: lambda context: (),
        _PassArg.context: lambda context: (context,),
        _PassArg.eval_context: lambda context: (context.eval_ctx,),
        _PassArg.environment: lambda context: (context.environment,),
    }[wanted]

    @pass_context
    def spending(context: Any, *args: Any, **options: Any) -> Any:
        budget = context.budget
        budget.spend(1 + max(map(_length, args), default=0) / CHARACTERS)
        if name in MULTIPLYING:
            budget.allow(math.prod(map(budget.weigh, (*args, *options.values()))))
        if name == "format":
            budget.allow_format(args[0], WIDE_PERCENT)
        return budget.result(function(*first(context), *args, **options))

    return spending


@pass_context
def _counted(context: Any, items: Iterable[Any]) -> Iterator[Any]:
    """`items`, of which each takes a step."""
    return _count(context.budget, items)


def _count(budget: _Budget, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        budget.spend(1)
        yield item


@pass_context
def _sized(context: Any, text: Any) -> Any:
    return context.budget.result(text)


class _Counting(NodeTransformer):
    """Passes what loops go through, and joined texts, through our filters."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, COUNTED)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, SIZED)


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, where rendering a text takes at most `STEPS` steps."""

    context_class = _Context
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.globals.pop("lipsum")  # makes any amount of text
        self.filters = _Filters({**self.filters, COUNTED: _counted, SIZED: _sized})

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        return super()._generate(_Counting().visit(source), *args, **options)

    def call(__self, __context: Any, __obj: Any, *args: Any, **options: Any) -> Any:
        budget = __context.budget
        if isinstance(__obj, LoopContext) and args:  # of a recursive loop
            args = (_count(budget, args[0]), *args[1:])
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps `format`
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str) and name in MULTIPLYING:
            budget.allow(math.prod(map(budget.weigh, (owner, *args, *options.values()))))
            if name.startswith("format"):
                budget.allow_format(owner, WIDE_BRACES)
        budget.spend(1 + _length(owner) / CHARACTERS)
        return budget.result(super().call(__context, __obj, *args, **options))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = context.budget
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > LARGEST_POWER:
                raise TemplateLimit(f"it computes a number of more than {LARGEST_POWER} bits")
        elif operator == "+":
            budget.allow(_length(left) + _length(right))
        elif operator == "%" and isinstance(left, str):
            budget.allow(left.count("%") * budget.weigh(right) + len(left))
            budget.allow_format(left, WIDE_PERCENT)
        elif operator == "*":
            budget.allow(budget.weigh(left) * budget.weigh(right) if _length(left) or _length(right) else 0)
        return budget.result(super().call_binop(context, operator, left, right))


# transformers makes the environment itself, from this name.
_REPLACED = "ImmutableSandboxedEnvironment"
if not hasattr(chat_template_utils, _REPLACED):
    raise ImportError(f"expected transformers.utils.chat_template_utils to use {_REPLACED}, got a version without it")
setattr(chat_template_utils, _REPLACED, BoundedEnvironment)


def render(processor: Any, where: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """The messages of the row at `where` as text, by the chat template of a processor.

    Raises `InputError` if the template fails, takes too long or makes too much text.
    """
    try:
        return processor.apply_chat_template(messages, **options)
    except Exception as error:  # templates raise any type
        expected = "a template that renders the messages of this row"
        raise InputError(where, "chat template", expected, describe(error)) from error
