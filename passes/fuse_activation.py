"""Let a linear layer over a packed weight apply the activation that follows it.

before:  y = fxlm.packed_linear(x, p, b, N); z = gelu(y)       quantized_linear alike
after:   z = fxlm.packed_linear(x, p, b, N, "gelu")

before:  p = fxlm.pack_weight(w); y = fxlm.packed_linear(x, p, b, N)               gate, up
         z = silu(y[..., :n]) * y[..., n:]
after:   p = fxlm.pack_weight(w, True)
         z = fxlm.packed_linear(x, p, b, N, "silu_and_mul")

The kernel applies it to the float32 sums: y is never written, and not rounded either. An
activation is known by what it computes, not by how a model spells it: the ops between y and z are
run on some numbers, so that GPT-J's gelu of tanh and pow, or BLOOM's of six products, will do. A
layer is left alone if something else sees y, if up comes before gate, or if its gate and up are
read elsewhere too (they would have to lie in two orders).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxlm.compiler.ops.epilogue import FUNCTIONS, GATED
from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program
from fxlm.passes.merged_linears import pieces_of

aten = torch.ops.aten
ops = torch.ops.fxlm
MOST_OPS = 16  # of an activation


def _layers(program: Program) -> list[fx.Node]:
    return program.find(ops.quantized_linear.default, ops.packed_linear.default)


def _fusable(program: Program) -> int:
    return sum(_epilogue(node) is not None for node in _layers(program))


@graph_pass(after=("fuse_quantized_linear", "pack_linears"), expects=_fusable, last=True)
def fuse_activation(program: Program) -> int:
    """Fuse what follows each packed linear layer into it; returns how many."""
    fused = 0
    for layer in _layers(program):
        found = _epilogue(layer)
        if found is None:
            continue
        name, result = found
        if name.endswith(GATED):
            for node in _packing(layer):
                node.args = (*node.args[: _last(node)], True)
        view = _viewed(layer)
        with program.graph.inserting_before(result):
            new = program.call(layer.target, *layer.args, name, like=result)
            if view is not layer:
                new = program.call(view.target, new, *view.args[1:], like=view)
        program.replace(result, new)
        fused += 1
    return fused


def _epilogue(layer: fx.Node) -> tuple[str, fx.Node] | None:
    """The name of what follows a layer, as the op has it, and the node that it ends in."""
    if len(layer.args) > _last(layer):  # it has one already
        return None
    return _activation(_viewed(layer)) or _gate(layer)


def _last(node: Any) -> int:
    """The place of an op's last argument: of a layer its epilogue, of a packing `gated`."""
    return len(node.target._schema.arguments) - 1


def _viewed(layer: fx.Node) -> fx.Node:
    """A layer, or its one view, where that is all that is seen of it: of Conv1D (GPT-2)."""
    (user,) = layer.users if len(layer.users) == 1 else (layer,)
    return user if user.target is aten.view.default else layer


def _gate(layer: fx.Node) -> tuple[str, fx.Node] | None:
    width = int(layer.meta["val"].shape[-1])
    halves = {bounds: piece for piece, bounds in pieces_of(layer).items()}
    gate, up = halves.get((0, width // 2)), halves.get((width // 2, width))
    if width % 2 or len(halves) != 2 or gate is None or up is None:
        return None
    found = _activation(gate)
    packings = (ops.pack_weight.default, ops.pack_codes.default, ops.pack_scale.default)
    if found is None or any(n.target not in packings or len(n.users) > 1 for n in _packing(layer)):
        return None
    name, activated = found
    (product,) = activated.users if len(activated.users) == 1 else (None,)
    if product is None or product.target is not aten.mul.Tensor or list(up.users) != [product]:
        return None
    return (name + GATED, product) if set(product.args) == {activated, up} else None


def _packing(layer: fx.Node) -> list[fx.Node]:
    """The nodes that bring the layer's weight into panels."""
    count = 1 if layer.target is ops.packed_linear.default else 3  # scales and offsets, too
    return [a for a in layer.args[1 : 1 + count] if isinstance(a, fx.Node)]


def _activation(start: fx.Node) -> tuple[str, fx.Node] | None:
    """The first of `FUNCTIONS` that the users of a value, and they alone, compute of it."""
    x = _numbers()
    values: dict[fx.Node, Tensor] = {start: x}
    todo = sorted(start.users)
    while todo and len(values) <= MOST_OPS:
        node = todo.pop(0)
        if not _pointwise(node) or any(n not in values for n in node.all_input_nodes):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        if not todo and values[node].dtype == x.dtype:  # what comes next comes from this node
            for name, function in FUNCTIONS.items():
                if torch.allclose(values[node], function(x), rtol=1e-6, atol=1e-6):
                    return name, node
        todo = sorted({*todo, *node.users})
    return None


def _numbers() -> Tensor:
    """Where activations are compared: dense where they bend, far out where a clamp would show."""
    near = torch.linspace(-8, 8, 129, dtype=torch.float64)
    far = 10.0 ** torch.arange(1, 6, dtype=torch.float64)
    return torch.cat([-far, near, far])


def _pointwise(node: Any) -> bool:
    return node.op == "call_function" and torch.Tag.pointwise in getattr(node.target, "tags", ())
