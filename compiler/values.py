"""Values: what calls of a graph give, on fake tensors; calls alike are evaluated once.

A fake tensor is a type, a shape and strides. What an op gives depends on no more than those of its
arguments, unless it gives a view of one; so layers that are alike have their values found, not
computed. Nodes may therefore share a value. Not here: the graph (`program`), real values (`load`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx

# The value of a call that was evaluated, and its arguments, which stay alive with their identities.
Known = dict[Any, tuple[Any, Any]]
_UNSURE = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def trust(graph: fx.Graph) -> None:
    """Take the values of all calls for what their arguments give."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.meta["of"] = _given(node)


def evaluate(
    node: fx.Node, known: Known, evaluating: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Compute ``meta["val"]`` of a call; an equal value that it has already stays.

    Args:
        node: a call; its arguments have values.
        known: values of calls by what they depend on; gets what is new.
        evaluating: the context in which ops are called.
    """
    given = _given(node)
    if node.meta.get("of") == given:
        return
    found, old = _value(node, known, evaluating), node.meta.get("val")
    if old is None or is_view(node) or not _same_type(old, found):
        node.meta["val"] = found
    node.meta["of"] = given


def _value(
    node: fx.Node, known: Known, evaluating: Callable[[], AbstractContextManager[Any]]
) -> Any:
    target: Any = node.target
    if _UNSURE.intersection(getattr(target, "tags", ())):
        with evaluating():
            return target(*_values(node.args), **_values(node.kwargs))
    by: Any = _same if is_view(node) else _typed
    key = (target, _key(node.args, by), _key(node.kwargs, by))
    if key not in known:
        args, kwargs = _values(node.args), _values(node.kwargs)
        with evaluating():
            known[key] = target(*args, **kwargs), (args, kwargs)
    return known[key][0]


def _values(arguments: Any) -> Any:
    return fx.map_arg(arguments, lambda node: node.meta["val"])


def _key(value: Any, by: Callable[[Any], Any]) -> Any:
    """Arguments as what can be looked up; values of nodes as ``by`` says."""
    if isinstance(value, fx.Node):
        return by(value.meta["val"])
    if isinstance(value, (list, tuple)):
        return tuple(_key(item, by) for item in value)
    if isinstance(value, dict):
        return tuple((name, _key(item, by)) for name, item in value.items())
    if isinstance(value, slice):
        return (slice, *(_key(part, by) for part in (value.start, value.stop, value.step)))
    return type(value), repr(value) if isinstance(value, float) else value


def _typed(value: Any) -> Any:
    """What is the same for values of one type and shape."""
    if isinstance(value, torch.Tensor):
        sizes = map(_size, (*value.shape, *value.stride(), value.storage_offset()))
        return (value.dtype, value.device, *sizes)
    if isinstance(value, (list, tuple)):
        return tuple(map(_typed, value))
    return type(value), _size(value)


def _size(size: Any) -> Any:
    return (
        size.node.expr if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) else size
    )


def _same_type(left: Any, right: Any) -> bool:
    """Whether two results are tensors of one type and shape, so that users need not know."""
    both = isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)
    return both and bool(_typed(left) == _typed(right))


class _Same:
    """A value of a node, equal to itself alone."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return type(other) is _Same and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _given(node: fx.Node) -> Any:
    """What the value of a call depends on: the op, and its arguments by value."""
    return (node.target, _key(node.args, _same), _key(node.kwargs, _same))


def _same(value: Any) -> _Same:
    return _Same(value)


def is_view(node: fx.Node) -> bool:
    """Whether a call may give memory of its arguments, rather than its own."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    return any(result.alias_info is not None for result in target._schema.returns)


def is_effect(node: fx.Node) -> bool:
    """Whether a call writes to its arguments."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
