"""Parts of weights, pushed down to the tensors of the checkpoint.

before:  w = cat([to(a), to(b)])                 and a rank needs w[0:8]
after:   w' = to(a')                             a' is the placeholder of rows 0..8 of a alone

`WeightParts.take` builds what computes a slice of a weight from slices of what the weight is
computed from, down to raw tensors; an input with a `Part` is read from the file as that part.
An op that slices cannot pass is computed whole and sliced behind it: right, but more is read.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxlm.compiler.program import INT64_MAX, Input, Part, Program
from fxlm.passes.layout import is_pointwise, is_tensor, sizes, viewed_dim

aten = torch.ops.aten

_TRANSPOSES = (aten.t.default, aten.numpy_T.default)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


class WeightParts:
    """Parts of the weights of one program, each made once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._made: dict[tuple[fx.Node, int, int, int], fx.Node] = {}

    def take(self, weight: fx.Node, dim: int, start: int, length: int) -> fx.Node:
        """The node of ``length`` indices of ``dim`` from ``start``; contiguous if it is dense.

        Args:
            weight: depends on weights and constants alone.
            dim: not negative.
        """
        if length == sizes(weight)[dim]:
            return weight
        key = (weight, dim, start, length)
        if key not in self._made:
            self._made[key] = self._take(*key)
        return self._made[key]

    def dense(self, weight: fx.Node) -> fx.Node:
        """``weight`` with neighbours beside each other: a part is read once, and kept so."""
        value: Any = weight.meta["val"]
        if value.is_contiguous():
            return weight
        key = (weight, -1, 0, 0)
        if key not in self._made:
            kwargs = {"memory_format": torch.contiguous_format}
            self._made[key] = self.after(weight, aten.clone.default, weight, **kwargs)
        return self._made[key]

    def padded(self, weight: fx.Node, length: int) -> fx.Node:
        """``weight`` with zeros behind the end of its first dimension, up to ``length``."""
        shape = sizes(weight)
        missing = length - shape[0]
        key = (weight, -2, 0, length)
        if missing and key not in self._made:
            pads = [0, 0] * (len(shape) - 1) + [0, missing]
            self._made[key] = self.after(weight, aten.constant_pad_nd.default, weight, pads)
        return self._made[key] if missing else weight

    def after(self, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call right behind ``node``, or behind the inputs if ``node`` is one."""
        last = self.program.placeholders()[-1] if node.op == "placeholder" else node
        with self.program.graph.inserting_before(last.next):
            return self.program.call(target, *args, like=node, **kwargs)

    def _take(self, node: fx.Node, dim: int, start: int, length: int) -> fx.Node:
        if node.op == "placeholder":
            found = self._input(node, dim, start, length)
        else:
            rule = _RULES.get(node.target) or _OURS.get(str(node.target))
            if rule is None and is_pointwise(node.target):
                rule = _pointwise
            found = rule(self, node, dim, start, length) if rule else None
        if found is not None:
            return found
        return self.after(node, aten.slice.Tensor, node, dim, start, start + length)

    def _input(self, node: fx.Node, dim: int, start: int, length: int) -> fx.Node | None:
        """A part of a raw tensor as an input of its own; None for a constant."""
        spec = self.program.inputs[node.name]
        if spec.role != "weight" or spec.part is not None:
            return None
        value: Any = node.meta["val"]
        # What is read is a view of the file; its strides are those of the whole.
        with self.program.fake_mode:
            narrow = value.narrow(dim, start, length)
        part = Part(dim=dim, start=start, length=length)
        meaning = Input(role="weight", source=spec.source, part=part)
        return self.program.add_input(f"{node.name}_{dim}_{start}_{length}", meaning, narrow)


_Rule = Callable[[WeightParts, Any, int, int, int], "fx.Node | None"]


def _pointwise(parts: WeightParts, node: Any, dim: int, start: int, length: int) -> fx.Node | None:
    """Every operand that is not broadcast there is cut alike, counted from the right."""
    from_right = len(sizes(node)) - dim
    changed: dict[fx.Node, fx.Node] = {}
    for operand in node.all_input_nodes:
        if not is_tensor(operand):
            return None
        shape = sizes(operand)
        if len(shape) >= from_right and shape[-from_right] != 1:
            changed[operand] = parts.take(operand, len(shape) - from_right, start, length)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: changed.get(n, n))
    last = max([node, *changed.values()])
    return parts.after(last if last.op != "placeholder" else node, node.target, *args, **kwargs)


def _transpose(parts: WeightParts, node: Any, dim: int, start: int, length: int) -> fx.Node:
    rank = len(sizes(node))
    order = _order(node, rank)
    inner = parts.take(node.args[0], order[dim], start, length)
    return parts.after(node, node.target, inner, *node.args[1:])


def _order(node: Any, rank: int) -> list[int]:
    """Which dimension of the input each dimension of a transposed weight is."""
    order = list(range(rank))
    if node.target in _TRANSPOSES:
        return order[::-1]
    if node.target is aten.permute.default:
        return [d % rank for d in node.args[1]]
    one, other = (d % rank for d in node.args[1:3])
    order[one], order[other] = other, one
    return order


def _cat(parts: WeightParts, node: Any, dim: int, start: int, length: int) -> fx.Node:
    along = _dim(node, 1) % len(sizes(node))
    if along != dim:
        pieces = [parts.take(item, dim, start, length) for item in node.args[0]]
        return parts.after(node, aten.cat.default, pieces, along)
    pieces = []
    begin = 0
    for item in node.args[0]:
        extent = sizes(item)[dim]
        low, high = max(start, begin), min(start + length, begin + extent)
        if low < high:
            pieces.append(parts.take(item, dim, low - begin, high - low))
        begin += extent
    return pieces[0] if len(pieces) == 1 else parts.after(node, aten.cat.default, pieces, along)


def _stack(parts: WeightParts, node: Any, dim: int, start: int, length: int) -> fx.Node:
    along = _dim(node, 1) % len(sizes(node))
    items = node.args[0]
    if along == dim:
        return parts.after(node, aten.stack.default, list(items[start : start + length]), along)
    inner = dim - (dim > along)
    pieces = [parts.take(item, inner, start, length) for item in items]
    return parts.after(node, aten.stack.default, pieces, along)


def _view(parts: WeightParts, node: Any, dim: int, start: int, length: int) -> fx.Node | None:
    """Slices pass a view where they are whole parts of a dimension that stays outermost."""
    before, after = sizes(node.args[0]), sizes(node)
    count = after[dim] // length
    if after[dim] % length or start % length:
        return None
    place = viewed_dim(after, before, dim, count)
    if place is None:
        return None
    extent = before[place] // count
    inner = parts.take(node.args[0], place, start // length * extent, extent)
    shape = [length if d == dim else size for d, size in enumerate(after)]
    return parts.after(node, aten.reshape.default, inner, shape)


def _slice(parts: WeightParts, node: Any, dim: int, start: int, length: int) -> fx.Node | None:
    given: list[Any] = [*node.args[1:], None, None, None, None][:4]
    along, begin, end, step = given
    extent = sizes(node.args[0])
    along = (along or 0) % len(extent)
    if step not in (None, 1):
        return None
    begin, end = _bounds(begin, end, extent[along])
    if along == dim:
        return parts.take(node.args[0], dim, begin + start, length)
    inner = parts.take(node.args[0], dim, start, length)
    return parts.take(inner, along, begin, end - begin)


def _bounds(begin: Any, end: Any, extent: int) -> tuple[int, int]:
    """Start and end of a slice as indices."""
    low = 0 if begin is None else begin
    high = extent if end is None or end == INT64_MAX else end
    low, high = (value + extent if value < 0 else value for value in (low, high))
    return min(low, extent), min(high, extent)


def _item(parts: WeightParts, node: Any, dim: int, start: int, length: int) -> fx.Node | None:
    """An item of a chunk or a split."""
    source, index = node.args
    if source.target not in _SPLITS:
        return None
    along = _dim(source, 2) % len(sizes(node))
    begin = sum(value.shape[along] for value in source.meta["val"][:index])
    if along == dim:
        return parts.take(source.args[0], dim, begin + start, length)
    inner = parts.take(source.args[0], dim, start, length)
    return parts.take(inner, along, begin, sizes(node)[along])


def _unsqueeze(parts: WeightParts, node: Any, dim: int, start: int, length: int) -> fx.Node | None:
    along = node.args[1] % len(sizes(node))
    if along == dim:
        return None
    inner = parts.take(node.args[0], dim - (dim > along), start, length)
    return parts.after(node, node.target, inner, along)


def _dequantize(parts: WeightParts, node: Any, dim: int, start: int, length: int) -> fx.Node | None:
    """Codes, scales and offsets of the part, if it consists of whole blocks."""
    codes, scale, offset, table, bits, block, *rest = node.args
    shape = sizes(node)
    at, begin, count = dim, start, length
    if dim >= len(shape) - 2:  # a scale serves a block of rows and columns; 0 is all of them
        extent = block[dim - len(shape)]
        ends = start + length == shape[dim]
        if extent and (start % extent or (length % extent and not ends)):
            return None
        at, begin, count = (dim, start // extent, -(-length // extent)) if extent else (-1, 0, 0)
    scales = [
        value if value is None or at < 0 else parts.take(value, at, begin, count)
        for value in (scale, offset)
    ]
    inner = parts.take(codes, dim, start, length)
    return parts.after(node, node.target, inner, *scales, table, bits, block, *rest)


def _dim(node: Any, place: int) -> int:
    """The argument ``dim`` of an op whose default is 0."""
    given: Sequence[Any] = node.args
    return int(given[place]) if len(given) > place else int(node.kwargs.get("dim", 0))


_RULES: dict[Any, _Rule] = {
    **dict.fromkeys((*_TRANSPOSES, aten.transpose.int, aten.permute.default), _transpose),
    **dict.fromkeys(_VIEWS, _view),
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.slice.Tensor: _slice,
    aten.unsqueeze.default: _unsqueeze,
    operator.getitem: _item,
}
# Ours are registered later than this file is imported.
_OURS: dict[str, _Rule] = {"fxlm.dequantize.default": _dequantize}
