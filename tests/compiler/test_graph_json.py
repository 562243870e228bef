"""graph_json: what is written is what runs, and nothing else can be named."""

from __future__ import annotations

import json
import weakref
from typing import Any

import pytest
import torch
from torch import fx

from fxlm.compiler import graph_json
from fxlm.compiler.errors import ArtifactError

aten = torch.ops.aten


def graph() -> fx.Graph:
    made = fx.Graph()
    x, y = made.placeholder("x"), made.placeholder("y")
    both = made.call_function(aten.cat.default, ([x, y], 0))
    size = made.call_function(aten.sym_size.int, (both, 0))
    half = made.call_function(aten.to.dtype, (both, torch.float64))
    low = made.call_function(aten.clamp.default, (half, float("-inf"), 2.0))
    flat = made.call_function(aten.view.default, (low, [size, -1]))
    made.output((flat, size))
    return made


def run(lines: Any, **inputs: torch.Tensor) -> list[Any]:
    return graph_json.Runner(json.loads(json.dumps(lines))).run(inputs)


def test_runs_as_written() -> None:
    x, y = torch.randn(2, 3), torch.randn(4, 3)
    out, size = run(graph_json.dump(graph()), x=x, y=y)
    assert size == 6
    torch.testing.assert_close(out, torch.cat([x, y]).double().clamp(max=2.0))


def test_inputs_are_read_when_first_needed() -> None:
    order: list[str] = []

    def read(name: str) -> torch.Tensor:
        order.append(name)
        return torch.ones(1, 1)

    graph_json.Runner(graph_json.dump(graph())).run(read)
    assert order == ["x", "y"]


def test_values_are_dropped_after_their_last_use() -> None:
    kept: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def read(name: str) -> torch.Tensor:
        alive.append(sum(reference() is not None for reference in kept))
        kept.append(weakref.ref(tensor := torch.ones(1)))
        return tensor

    made = fx.Graph()
    value = None
    for number in range(4):
        given = made.placeholder(f"x{number}")
        doubled = made.call_function(aten.mul.Tensor, (given, 2.0))
        value = doubled if value is None else made.call_function(aten.add.Tensor, (value, doubled))
    made.output((value,))
    assert graph_json.Runner(graph_json.dump(made)).run(read)[0].item() == 8.0
    assert alive == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "op", ["os.system.default", "aten.nothing.default", "builtins.eval", "eval"]
)
def test_unknown_ops_are_refused(op: str) -> None:
    with pytest.raises(ArtifactError, match="which this build does not have"):
        graph_json.Runner([["in", "x"], ["op", "y", op, [{"node": "x"}], {}], ["out", []]])


def test_unknown_values_are_refused() -> None:
    with pytest.raises(ArtifactError, match="nowhere made"):
        graph_json.Runner([["out", [{"node": "ghost"}]]])
    with pytest.raises(ArtifactError, match="unknown value"):
        graph_json.Runner([["out", [{"torch": "load"}]]])
