"""Cutout: the part of a graph that computes one value, as Python that a person can read and run.

Here: text of functions, for reproduction scripts and for looking. Not here: which value, and
what is compared (``fxlm.runtime.explain.bisect``).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxlm.compiler.program import Program, module_path


@dataclass(frozen=True, kw_only=True, slots=True)
class Cutout:
    """A function in Python.

    Attributes:
        text: ``def NAME(...):`` and its body.
        inputs: parameter names: nodes of the boundary and placeholders, in order.
        ops: names of the ops that it calls.
    """

    text: str
    inputs: list[str]
    ops: list[str]


def cutout(program: Program, target: str | None, boundary: Collection[str], name: str) -> Cutout:
    """The function that computes node ``target`` (None: what the program returns).

    Args:
        boundary: names of nodes that are given instead of computed.
        name: of the function.
    """
    nodes = list(program.graph.nodes)
    goal = nodes[-1] if target is None else next(n for n in nodes if n.name == target)
    needed = _needed(goal, set(boundary) - {target})
    inputs = [n.name for n in nodes if n in needed and _is_given(n, boundary, goal)]
    body = [n for n in nodes if n in needed and n.name not in inputs and n.op == "call_function"]
    result = goal.args[0] if goal.op == "output" else goal
    lines = [f"def {name}({', '.join(inputs)}):"]
    lines += [f"    {n.name} = {call_text(n)}  # {module_path(n)}".rstrip("# ") for n in body]
    lines.append(f"    return {value_text(result)}")
    return Cutout(text="\n".join(lines), inputs=inputs, ops=sorted({str(n.target) for n in body}))


def _needed(goal: fx.Node, boundary: set[str]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = [goal]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            if node.name not in boundary:
                todo.extend(node.all_input_nodes)
    return found


def _is_given(node: fx.Node, boundary: Collection[str], goal: fx.Node) -> bool:
    return node.op == "placeholder" or (node.name in boundary and node is not goal)


def call_text(node: fx.Node) -> str:
    """A call as an expression, e.g. ``torch.ops.aten.silu.default(x)``."""
    args = [value_text(a) for a in node.args]
    args += [f"{key}={value_text(v)}" for key, v in node.kwargs.items()]
    return f"{_target_text(node.target)}({', '.join(args)})"


def _target_text(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target}"
    module = str(target.__module__).removeprefix("_")  # _operator
    return f"{'torch' if module.startswith('torch') else module}.{target.__name__}"


def value_text(value: Any) -> str:
    """An argument as an expression."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        inner = ", ".join(value_text(v) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    return repr(value)
