"""Views: a graph as plain data to read and to draw, by layer, and what changed between two.

Node names are the same in every stage of one column, so a name that two graphs share is the same
value. Not here: layout and pictures (``fxlm.runtime.explain``).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from fxlm.compiler.cutout import value_text
from fxlm.compiler.outline import layer_numbers
from fxlm.compiler.program import Program, module_path

Kind = Literal["call", "weight code", "weight", "constant", "cache", "step", "outer"]
Mark = Literal["same", "added", "removed", "changed"]
OUTSIDE = -1
_SHORT = {
    torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One value of a graph.

    Attributes:
        name: of the node.
        label: short name of the op, or of what is given.
        kind: what it is; ``outer`` is a value made in another layer.
        type: element type and shape, e.g. ``bf16 [1, T, 64]``.
        module: path of the module that made it.
        inputs: names of the values that it takes.
        text: the call as a line of Python.
    """

    name: str
    label: str
    kind: Kind
    type: str
    module: str
    inputs: tuple[str, ...]
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One layer before and after a pass, as one graph.

    Attributes:
        layer: its number; `OUTSIDE` is all that belongs to no layer.
        views: values of both graphs, by name; a value of both is as it is after.
        marks: what became of each.
        diff: unified diff of the lines.
        num_changed: values that are not the same.
    """

    layer: int
    views: Mapping[str, View]
    marks: Mapping[str, Mark]
    diff: Sequence[str]

    @property
    def num_changed(self) -> int:
        """Values that are not as they were."""
        return sum(mark != "same" for mark in self.marks.values())


def layer_views(program: Program) -> dict[int, dict[str, View]]:
    """Every call by layer and name; what each layer is given comes with it."""
    layers = _layers(program)
    early = program.weight_only()
    names = _symbol_names(program)
    nodes = {n: layer for n, layer in layers.items() if not _is_size(n)}
    found: dict[int, dict[str, View]] = {}
    for node, layer in nodes.items():
        views = found.setdefault(layer, {})
        for given in node.all_input_nodes:
            if given.op == "placeholder" or nodes.get(given, layer) != layer:
                views.setdefault(given.name, _given(program, given, names))
        views[node.name] = _call(program, node, node in early, names)
    return found


def _layers(program: Program) -> dict[fx.Node, int]:
    """The layer of each call; code on weights belongs where its result is used."""
    layers = layer_numbers(program.graph)
    early = program.weight_only()
    for node in reversed(list(layers)):
        users = {layers.get(user, OUTSIDE) for user in node.users}
        if layers[node] == OUTSIDE and len(users) == 1 and node in early:
            layers[node] = users.pop()
    return layers


def compared(before: Program, after: Program) -> Picture:
    """The layer in which a pass changed most (the first of equals), before and after it."""
    left, right = layer_views(before), layer_views(after)
    pictures = [
        _picture(layer, left.get(layer, {}), right.get(layer, {}))
        for layer in sorted({*left, *right}, key=lambda number: (number == OUTSIDE, number))
    ]
    inside = [p for p in pictures if p.layer != OUTSIDE and p.num_changed]
    return max(inside or pictures, key=lambda picture: picture.num_changed)


def _picture(layer: int, before: Mapping[str, View], after: Mapping[str, View]) -> Picture:
    marks: dict[str, Mark] = {}
    for name in [*before, *(n for n in after if n not in before)]:
        if name not in after:
            marks[name] = "removed"
        elif name not in before:
            marks[name] = "added"
        else:
            same = before[name].text == after[name].text
            marks[name] = "same" if same else "changed"
    lines = [[f"{v.text}  # {v.type}" for v in side.values() if v.kind in ("call", "weight code")]
             for side in (before, after)]  # fmt: skip
    diff = list(difflib.unified_diff(lines[0], lines[1], lineterm="", n=2))[2:]
    views = {**before, **after}
    if layer == OUTSIDE:
        views = _near(views, marks)
    return Picture(
        layer=layer, views=views, marks={n: marks[n] for n in views}, diff=diff
    )  # fmt: skip


def _near(views: Mapping[str, View], marks: Mapping[str, Mark]) -> dict[str, View]:
    """What changed and its neighbours: outside of the layers there is much of all sorts."""
    chosen = {name for name, mark in marks.items() if mark != "same"}
    for _ in range(2):
        users = {n for n, v in views.items() if chosen & set(v.inputs)}
        chosen |= users | {i for n in chosen for i in views[n].inputs if i in views}
    return {n: v for n, v in views.items() if n in chosen}


def _call(program: Program, node: fx.Node, early: bool, names: Mapping[Any, str]) -> View:
    return View(
        name=node.name,
        label=op_label(node.target),
        kind="weight code" if early else "call",
        type=type_text(node.meta.get("val"), names),
        module=module_path(node),
        inputs=tuple(n.name for n in node.all_input_nodes if not _is_size(n)),
        text=_text(program, node, names),
    )


def _given(program: Program, node: fx.Node, names: Mapping[Any, str]) -> View:
    """A placeholder, or a value of another layer."""
    spec = program.inputs.get(node.name) if node.op == "placeholder" else None
    label = _short_source(spec.source) if spec is not None else node.name
    if spec is not None and spec.role == "cache":
        label = f"{spec.source} cache"
    return View(
        name=node.name, label=label, kind="outer" if spec is None else spec.role,
        type=type_text(node.meta.get("val"), names), module="", inputs=(), text=label,
    )  # fmt: skip


def _text(program: Program, node: fx.Node, names: Mapping[Any, str]) -> str:
    args = [value_text(a) for a in node.args]
    args += [f"{key}={value_text(v)}" for key, v in node.kwargs.items()]
    text = f"{node.name} = {op_label(node.target)}({', '.join(args)})"
    for given in node.all_input_nodes:
        spec = program.inputs.get(given.name) if given.op == "placeholder" else None
        if spec is not None and spec.role in ("weight", "constant"):
            text = re.sub(rf"\b{re.escape(given.name)}\b", f"<{_short_source(spec.source)}>", text)
        elif _is_size(given):
            size = _symbol(given.meta["val"], names)
            text = re.sub(rf"\b{re.escape(given.name)}\b", size, text)
    return text


def _short_source(source: str) -> str:
    """A tensor's name without the path to its layer."""
    return re.sub(r"^.*?\.\d+\.", "", source)


def op_label(target: Any) -> str:
    """Short name of an op: ``linear``, ``paged_attention``."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return str(target.__name__)


def type_text(value: Any, names: Mapping[Any, str]) -> str:
    """A fake value as short text, e.g. ``bf16 [1, T, 64]``."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(str(s) if isinstance(s, int) else _symbol(s, names) for s in value.shape)
        return f"{_SHORT.get(value.dtype, str(value.dtype).removeprefix('torch.'))} [{sizes}]"
    return f"{len(value)} values" if isinstance(value, (tuple, list)) else ""


def _symbol(size: Any, names: Mapping[Any, str]) -> str:
    """A size that changes from step to step, by the letters of the step's inputs."""
    expression = getattr(getattr(size, "node", None), "expr", None)
    if expression in names:
        return names[expression]
    if expression is None:
        return "?"
    letters = {known: _letters(name) for known, name in names.items()}  # else S is sympy's own
    return str(expression.subs(letters))


def _letters(name: str) -> Any:
    """The expression of a name such as ``S`` or ``S+1``."""
    import sympy

    letter, _, more = name.partition("+")
    return sympy.Symbol(letter) + int(more or 0)


def _symbol_names(program: Program) -> dict[Any, str]:
    """Expression of each named size -> its letter."""
    program.symbol("T")
    return {size.node.expr: name for name, size in program.symbols.items()}


def _is_size(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))
