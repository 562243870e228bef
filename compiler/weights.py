"""Weight code as graph code: trace a function of checkpoint tensors into a program.

A checkpoint's tensors rarely are the model's parameters: they are renamed, stacked, split,
transposed, quantized. The function that undoes this is run once on fake tensors, and what it
did becomes nodes of the graph, which `hoist` later moves into the load graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxlm.compiler.program import Input, Program

Convert = Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]


def graft_weights(
    program: Program, convert: Convert, raw: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> dict[str, fx.Node]:
    """Trace ``convert`` and insert it behind new weight inputs.

    Args:
        program: gets one ``weight`` input for each raw tensor that the result needs.
        convert: from raw tensors by checkpoint name to parameters by qualified name.
        raw: dtype and shape of every raw tensor.

    Returns:
        The node that computes each parameter.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    names = list(raw)
    fakes = [_fake(program, *raw[name]) for name in names]
    keys: list[str] = []

    def flat(*tensors: torch.Tensor) -> list[torch.Tensor]:
        result = convert(dict(zip(names, tensors, strict=True)))
        keys.extend(result)
        return list(result.values())

    with program.fake_mode, torch.no_grad():
        traced = make_fx(flat, tracing_mode="real")(*fakes)
    values = _graft(program, traced.graph, names, fakes)
    outputs: Any = next(iter(reversed(traced.graph.nodes))).args[0]
    return {key: values[node] for key, node in zip(keys, outputs, strict=True)}


def _fake(program: Program, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    with program.fake_mode:
        return torch.empty(shape, dtype=dtype, device=program.facts.device)


def _graft(
    program: Program, traced: fx.Graph, names: list[str], fakes: list[torch.Tensor]
) -> dict[fx.Node, fx.Node]:
    copies: dict[fx.Node, fx.Node] = {}
    holders = [n for n in traced.nodes if n.op == "placeholder"]
    needed = {n for n in traced.nodes if n.users}
    for holder, name, fake in zip(holders, names, fakes, strict=True):
        if holder in needed:
            spec = Input(role="weight", source=name)
            copies[holder] = program.add_input(_identifier(name), spec, fake)
    first = next(n for n in program.graph.nodes if n.op != "placeholder")
    with program.graph.inserting_before(first):
        for node in traced.nodes:
            if node.op == "call_function":
                copies[node] = program.graph.node_copy(node, copies.__getitem__)
            assert node.op in ("call_function", "placeholder", "output"), node.format_node()
    return copies


def _identifier(name: str) -> str:
    return "w_" + "".join(c if c.isalnum() else "_" for c in name)
