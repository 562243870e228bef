"""The Jinja environment of chat templates: a sandbox with a clock and bounds on size.

Jinja's sandbox keeps templates from Python's insides, but not from loops without end or
texts without bound. Here every turn of a loop and every call looks at the clock, and every
operation that makes text longer at its size. Not here: what templates are given
(`fxlm.models.chat`).
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial, wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_LENGTH = 1 << 24  # characters or items of one value: a bomb, never a prompt
_TICK, _JOIN = "__fxlm_tick", "__fxlm_join"
_WIDE = re.compile(r"\d{6,}|\*")  # a field width that no prompt has

_deadline = threading.local()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Within: templates rendered by this thread fail once ``seconds`` are over."""
    _deadline.at = time.monotonic() + seconds
    try:
        yield
    finally:
        del _deadline.at


def tick(*args: Any) -> str:
    """Look at the clock.

    Raises:
        TemplateError: the time limit is over.
    """
    if time.monotonic() > getattr(_deadline, "at", float("inf")):
        raise jinja2.TemplateError("it runs too long")
    return ""


def _bounded(length: int) -> None:
    if length > MAX_LENGTH:
        raise jinja2.TemplateError(f"a value of length {length} is too long")


def _join(*parts: Any) -> str:
    """The ``~`` operator."""
    texts = [str(part) for part in parts]
    _bounded(sum(map(len, texts)))
    return "".join(texts)


class _Guard(NodeTransformer):
    """Put the clock in front of loop bodies and macros, bounds around ``~``."""

    def _body(self, node: Any) -> Any:
        self.generic_visit(node)
        call = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(call))
        return node

    visit_For = _body
    visit_Macro = _body

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.Name(_JOIN, "load"), node.nodes, [], None, None)


class _Generation(Extension):
    """``{% generation %}`` marks what an assistant said; here it renders as its body."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own form

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    @staticmethod
    def _body(caller: Callable[[], str]) -> str:
        return caller()


class Environment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with a clock and bounds."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        tick()
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        if isinstance(owner, str):
            for value in (*args, *kwargs.values()):
                if isinstance(value, int):
                    _bounded(abs(value))
            if getattr(obj, "__name__", "").startswith("format"):
                _plain_width(owner)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sized = (str, list, tuple)
        if operator == "+" and isinstance(left, sized) and isinstance(right, sized):
            _bounded(len(left) + len(right))
        elif operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(items, sized) and isinstance(times, int):
                    _bounded(len(items) * times)
        elif operator == "**" and (abs(left) > 1 << 16 or abs(right) > 64):
            raise jinja2.TemplateError("a power is too large")
        elif operator == "%" and isinstance(left, str):
            _plain_width(left)
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Guard().visit(super()._parse(source, name, filename))
        for node in tree.find_all(nodes.Node):
            node.environment = self
        return tree


def _plain_width(form: str) -> None:
    if _WIDE.search(form):
        raise jinja2.TemplateError(f"the width in {form[:40]!r} is too large")


def _narrow(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A filter of Jinja whose integers must be small (a width, an indent, a count)."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, int):
            _bounded(abs(value))
    return original(*args, **kwargs)


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    _plain_width(str(value))
    return str(value) % (kwargs or args)


def _join_filter(eval_ctx: Any, value: Any, d: str = "", attribute: Any = None) -> str:
    from jinja2.filters import sync_do_join

    items = list(value)
    _bounded(sum(len(str(item)) + len(d) for item in items if attribute is None))
    return sync_do_join(eval_ctx, items, d, attribute)


class _Namespace(jinja2.utils.Namespace):
    """``namespace(...)`` that takes no name with an underscore first."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as Jinja's: ``self`` may be a keyword
        for name in dict(*args[1:], **kwargs):
            _plain_name(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _plain_name(name)
        super().__setitem__(name, value)


def _plain_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.TemplateError(f"a namespace cannot hold {name!r}")


class _Dict:
    """``dict(...)`` without the class's other attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML characters; templates want plain JSON."""
    if isinstance(indent, int) and indent > 64:
        raise jinja2.TemplateError(f"an indent of {indent} is too large")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def environment() -> Environment:
    """The environment with what chat templates expect: filters, functions, tags."""
    made = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    for name in ("center", "indent", "batch", "slice", "wordwrap", "truncate"):
        original = made.filters[name]
        made.filters[name] = wraps(original)(partial(_narrow, original))  # keeps Jinja's marks
    made.filters["tojson"] = _tojson
    made.filters["format"] = _format
    made.filters["join"] = jinja2.pass_eval_context(_join_filter)
    made.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        dict=_Dict(),
        namespace=_Namespace,
        **{_TICK: tick, _JOIN: _join},
    )
    return made
