"""Remove what changes nothing: assertions on metadata, casts to the same type, full slices.

before:  _assert_tensor_metadata(x); a = aten.to.dtype(x, x.dtype); b = aten.slice(a, 1, 0, MAX)
after:   (users of b use x)

A cast of a weight that is dequantized to float32 becomes the type that it is dequantized to:

before:  aten._to_copy(fxlm.dequantize(codes, ..., float32, ...), dtype=bfloat16)
after:   fxlm.dequantize(codes, ..., bfloat16, ...)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import INT64_MAX, Program
from fxlm.passes.quantized_weights import quantized

aten = torch.ops.aten

_ASSERTIONS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)


@graph_pass
def cleanup(program: Program) -> int:
    """Erase assertions and identities; returns how many."""
    erased = 0
    for node in list(program.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _ASSERTIONS:
            program.graph.erase_node(node)
            erased += 1
            continue
        same = _IDENTITIES.get(node.target)
        if (same is not None and same(node)) or _fold_cast(node):
            program.replace(node, node.args[0])
            erased += 1
    return erased


def _fold_cast(node: fx.Node) -> bool:
    """Let a weight be dequantized to the type that its only user casts it to."""
    source, dtype = node.args[0] if node.args else None, _cast_to(node)
    weight = quantized(source)
    if weight is None or weight.dtype != torch.float32 or dtype is None:
        return False
    assert isinstance(source, fx.Node), node.format_node()
    if len(source.users) > 1:
        return False
    source.update_arg(6, dtype)
    source.meta["val"] = node.meta["val"]
    return True


def _cast_to(node: fx.Node) -> Any:
    """The type that a node casts to if it does nothing else; None for any other node."""
    if node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs:
        return node.args[1]
    if node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"}:
        return node.kwargs["dtype"]
    return None


def _same_type(node: fx.Node) -> bool:
    """A cast, copy or move whose result is its input, type, device and strides included."""
    before: Any = node.args[0].meta["val"]  # type: ignore[union-attr]
    after: Any = node.meta["val"]
    return bool(
        before.dtype == after.dtype
        and before.device == after.device
        and not node.kwargs.get("copy", False)
        and before.stride() == after.stride()
    )


def _full_slice(node: fx.Node) -> bool:
    given: list[Any] = [*node.args[2:], None, None, None][:3]
    start, end, step = given
    return start in (None, 0) and end in (None, INT64_MAX) and step in (None, 1)


def _always(node: fx.Node) -> bool:
    return True


def _not_training(node: fx.Node) -> bool:
    return node.args[2] is False


_IDENTITIES: dict[Any, Callable[[fx.Node], bool]] = {
    aten.to.dtype: _same_type,
    aten.to.device: _same_type,
    aten.to.dtype_layout: _same_type,
    aten.contiguous.default: _same_type,
    aten.slice.Tensor: _full_slice,
    aten.alias.default: _always,
    aten.detach.default: _always,
    aten.detach_.default: _always,
    aten.lift_fresh_copy.default: _always,
    aten.dropout.default: _not_training,
}
