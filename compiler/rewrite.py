"""Helpers for passes: find by module path, insert around modules, replace a pattern.

Everything here works on a `Program` and keeps metadata. Not here: the graph itself (`program`),
when a pass runs (`pipeline`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxlm.compiler.errors import PassError
from fxlm.compiler.nearest import hint
from fxlm.compiler.program import Program, module_path, module_paths

# From the program and a node to the node that takes its place.
Change = Callable[[Program, fx.Node], fx.Node]


def layer_paths(program: Program) -> list[str]:
    """Paths of the decoder layers in order, e.g. ``model.layers.0``: what holds the attentions."""
    found: dict[str, None] = {}
    for node in program.attentions():
        match = re.match(r"(.*?\.\d+)(\.|$)", module_path(node))
        if match:
            found[match.group(1)] = None
    return list(found)


def module_output(program: Program, path: str) -> fx.Node:
    """The tensor that leaves the module at ``path``, e.g. the residual stream after a layer.

    Raises:
        PassError: no node comes from that module; the message names the nearest path.
    """
    inside = _inside(program, path)
    leaving = [n for n in inside if _is_float(n) and any(u not in inside for u in n.users)]
    if not leaving:
        raise PassError(f"nothing leaves the module {path!r}")
    return leaving[-1]


def module_input(program: Program, path: str) -> fx.Node:
    """The tensor of tokens that enters the module at ``path`` first.

    Raises:
        PassError: see `module_output`.
    """
    inside = _inside(program, path)
    fixed = program.weight_only()
    for node in inside:
        for given in node.all_input_nodes:
            if given not in inside and given not in fixed and _is_float(given):
                return given
    raise PassError(f"no floating tensor of tokens enters the module {path!r}")


def insert_after(program: Program, path: str, change: Change) -> fx.Node:
    """Let what is behind the module at ``path`` see ``change`` of its output.

    Args:
        program: changed in place.
        path: of a module, as in the Hugging Face model.
        change: inserts nodes and gives the new value, of the same shape and type.

    Returns:
        The new node.
    """
    return _swap(program, module_output(program, path), change)


def insert_before(program: Program, path: str, change: Change) -> fx.Node:
    """Let the module at ``path`` see ``change`` of its input; others see the input as it was."""
    value = module_input(program, path)
    inside = set(_inside(program, path))
    return _swap(program, value, change, lambda user: user in inside)


def wrap_linears(program: Program, pattern: str, change: Change) -> int:
    """Apply ``change`` to the result of every linear layer whose path matches.

    Args:
        program: changed in place.
        pattern: regular expression, searched in the module path.
        change: see `insert_after`.

    Returns:
        How many were wrapped.
    """
    nodes = program.linears(pattern)
    for node in nodes:
        _swap(program, node, change)
    return len(nodes)


def replace_pattern(
    program: Program,
    pattern: Callable[..., Any],
    replacement: Callable[..., Any],
    *,
    where: str = "",
) -> int:
    """Replace every subgraph that computes ``pattern`` by ``replacement``.

    Both are functions of the same tensors, written with overloads of ops
    (``torch.ops.aten.mul.Tensor``), that return one tensor. Constants in the pattern must occur
    as they are. Values inside the match must not be used outside of it. Where matches overlap,
    the first in graph order is taken.

    Args:
        program: changed in place.
        pattern: what to look for; its arguments match any value.
        replacement: what to put there.
        where: regular expression that the module path of the result must match.

    Returns:
        How many matches were replaced.
    """
    from torch.fx.passes.utils.matcher_utils import SubgraphMatcher

    wanted, other = fx.symbolic_trace(pattern).graph, fx.symbolic_trace(replacement).graph
    names = [n.name for n in wanted.nodes if n.op == "placeholder"]
    if names != [n.name for n in other.nodes if n.op == "placeholder"]:
        raise PassError(f"pattern and replacement must take the same arguments, {names}")
    matches = SubgraphMatcher(wanted, match_output=False, match_placeholder=False).match(
        program.graph, node_name_match=""
    )
    count = 0
    for match in matches:
        (result,) = match.returning_nodes
        if where and not re.search(where, module_path(result)):
            continue
        given = dict(zip(names, match.placeholder_nodes, strict=True))
        with program.graph.inserting_before(result):
            new = _copy(program, other, given, result)
        program.replace(result, new)
        count += 1
    return count


def _copy(program: Program, graph: fx.Graph, given: dict[str, fx.Node], like: fx.Node) -> fx.Node:
    copies: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            copies[node] = given[node.name]
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
            copies[node] = program.call(node.target, *args, like=like, **kwargs)
        elif node.op == "output":
            made: fx.Node = copies[node.args[0]]
            return made
        else:
            raise PassError(f"a replacement may only call ops; it has {node.format_node()}")
    raise AssertionError("a graph without an output")


def _swap(
    program: Program,
    node: fx.Node,
    change: Change,
    uses: Callable[[fx.Node], bool] = lambda _: True,
) -> fx.Node:
    before = set(program.graph.nodes)
    with program.graph.inserting_before(_behind(program, node)):
        new = change(program, node)
    have: Any = node.meta["val"]
    made: Any = new.meta["val"]
    if have.shape != made.shape or have.dtype != made.dtype:
        raise PassError(
            f"{module_path(node)}: {have.dtype} {list(have.shape)} cannot be replaced by "
            f"{made.dtype} {list(made.shape)}"
        )
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user in before and uses(user))
    return new


def _behind(program: Program, node: fx.Node) -> fx.Node:
    """Where code on ``node`` can stand: behind it, and behind the placeholders."""
    last = program.placeholders()[-1]
    return last.next if node.op == "placeholder" else node.next


def _inside(program: Program, path: str) -> dict[fx.Node, None]:
    found = dict.fromkeys(n for n in program.graph.nodes if path in module_paths(n))
    if found:
        return found
    near = hint(path, sorted({p for n in program.graph.nodes for p in module_paths(n)}))
    raise PassError(f"the graph has no module {path!r}{near and f'; {near}'}")


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point
