"""A Jinja sandbox that limits the work and memory of an untrusted template.

Jinja's own sandbox closes the ways out of the template but lets it loop and grow without end. Here
loops, operators, filters, calls and outputs are measured, in advance where a result can be much
larger than its operands, and counted against one budget a render. It counts work rather than
seconds: a template that passes once always passes.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment

MAX_CHARACTERS = 2_000_000
MAX_WORK = 50_000_000
_STEP_WORK = 250  # of anything but handling text, which counts by the character,
_ITEM_WORK = 4  # and looking through containers

_LOOP_FILTER = "_lora_jax_loop"
_CHECK_FILTER = "_lora_jax_check"
_WIDE_FIELD = re.compile(r"\d{6}")

_spent: ContextVar[list[int]] = ContextVar("spent")


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Within it, templates are rendered with a budget of their own."""
    token = _spent.set([0])
    try:
        yield
    finally:
        _spent.reset(token)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """An immutable sandbox that raises `jinja2.TemplateError` when a template does too much."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_check, **options)
        # Text by the million words, of no use to a chat.
        del self.globals["lipsum"]
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)
        self.filters |= {_LOOP_FILTER: _metered, _CHECK_FILTER: _check}

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Adds a filter, bounded like all others."""

        @functools.wraps(function)  # keeps the mark of filters that take the environment first
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            own = 1 if hasattr(function, "jinja_pass_arg") else 0
            _check_arguments(name, (*args[own:], *kwargs.values()))
            return _check(function(*args, **kwargs))

        self.filters[name] = wrapper

    def from_string(self, source: Any, *args: Any, **options: Any) -> jinja2.Template:
        tree = self.parse(source)
        for parent in list(tree.find_all(nodes.Node)):
            _instrument(parent)
        return super().from_string(tree, *args, **options)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator != "+":  # a sum is no larger than its operands, which were checked
            _refuse_large(_largest_result(operator, left, right))
        return _check(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        name = getattr(__obj, "__name__", "")
        _check_arguments(name, (owner, *args, *kwargs.values()))
        return _check(super().call(__context, __obj, *args, **kwargs))


def _instrument(node: nodes.Node) -> None:
    """Routes what Jinja has no hook for through our filters: loops, `~`, slices, `in`."""
    for field, value in list(node.iter_fields()):
        if isinstance(value, list):
            value[:] = [_checked(item) for item in value]
        else:
            setattr(node, field, _checked(value))
    if isinstance(node, nodes.For):
        node.iter = _through(_LOOP_FILTER, node.iter)
    elif isinstance(node, nodes.Operand) and not isinstance(node.expr, nodes.Const):
        node.expr = _through(_CHECK_FILTER, node.expr)


def _checked(item: Any) -> Any:
    sliced = isinstance(item, nodes.Getitem) and isinstance(item.arg, nodes.Slice)
    return _through(_CHECK_FILTER, item) if sliced or isinstance(item, nodes.Concat) else item


def _through(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _metered(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _spend(_STEP_WORK)
        yield item


def _check(value: Any) -> Any:
    size = _size(value)
    _spend(size if isinstance(value, str) else _STEP_WORK)
    return value


def _check_arguments(name: str, arguments: tuple[Any, ...]) -> None:
    """Refuses a filter or a method (its owner comes first) whose result would be too large."""
    for argument in arguments:
        _check(argument)
        if isinstance(argument, int):  # a width, an indent, a count
            _refuse_large(argument)
    counts = [a if isinstance(a, int) else _length(a) for a in arguments if a is not None]
    if name in ("tojson", "indent", "expandtabs", "join"):
        _refuse_large(functools.reduce(int.__mul__, (max(1, count) for count in counts), 1))
    elif name == "replace" and len(counts) > 2:
        text, old, new = counts[:3]
        _refuse_large(text // max(1, old) * new)
    elif name in ("format", "format_map"):
        _refuse_wide_fields(str(arguments[0]))


def _largest_result(operator: str, left: Any, right: Any) -> int:
    """A bound, from its operands alone, of the characters that an operator's result takes."""
    if operator == "%" and isinstance(left, str):
        _refuse_wide_fields(left)
    if operator == "**" and isinstance(right, int):
        return _size(left) * right
    if operator == "*":
        for repeated, count in ((left, right), (right, left)):
            if isinstance(repeated, (str, list, tuple)) and isinstance(count, int):
                return _size(repeated) * count
    return _size(left) + _size(right)


def _size(value: Any) -> int:
    """Characters that `value` takes when written out; raises while counting if too many."""
    if isinstance(value, str):  # nearly all of them
        _refuse_large(len(value))
        return len(value)
    total, visited, pending = 0, 0, [value]
    while pending:
        item = pending.pop()
        visited += 1
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, int):
            total += 1 + item.bit_length() // 3
        elif isinstance(item, dict):
            total += 1
            pending += [*item, *item.values()]
        elif isinstance(item, (list, tuple)):
            total += 1
            pending += item
        elif isinstance(item, range):
            visited += len(item)
        _refuse_large(total)
    _spend(_ITEM_WORK * visited)
    return total


def _length(value: Any) -> int:
    """A bound of its length; a value without one is a range, which the sandbox bounds."""
    if isinstance(value, dict | list | tuple):
        return _size(value)
    return len(value) if isinstance(value, Sized) else MAX_RANGE


def _refuse_wide_fields(template: str) -> None:
    if _WIDE_FIELD.search(template):
        raise jinja2.TemplateError("it formats a value into a field of absurd width.")


def _refuse_large(characters: int) -> None:
    if characters > MAX_CHARACTERS:
        raise jinja2.TemplateError(f"it builds a value of more than {MAX_CHARACTERS:,} characters.")


def _spend(work: int) -> None:
    spent = _spent.get()
    spent[0] += work
    if spent[0] > MAX_WORK:
        raise jinja2.TemplateError("it does more work than a conversation can need.")
