"""weight_parts: slices reach the raw tensors, and give what slicing the whole gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxlm.compiler import ops
from fxlm.compiler.capture import capture
from fxlm.compiler.program import Program
from fxlm.compiler.weights import graft_weights
from fxlm.passes.weight_parts import WeightParts
from tests.programs import facts, tiny_model

Convert = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def program() -> Program:
    ops.load()
    return capture(tiny_model(num_hidden_layers=1), facts())


def values(raw: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in raw.items()}


def evaluate(program: Program, node: Any, raw: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The value of a weight, and how many numbers of the raw tensors it is made of."""
    if not isinstance(node, torch.fx.Node):
        return node, 0
    if node.op == "placeholder":
        spec = program.inputs[node.name]
        part, value = spec.part, raw[spec.source]
        value = value.narrow(part.dim, part.start, part.length) if part else value
        return value, value.numel()
    counts = []

    def fetch(inner: torch.fx.Node) -> torch.Tensor:
        value, count = evaluate(program, inner, raw)
        counts.append(count)
        return value

    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), fetch)
    target: Any = node.target
    return target(*args, **kwargs), sum(counts)


def dequantized(raw: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    codes = raw["a"].to(torch.int8)
    scale = raw["b"]
    return {
        "w": torch.ops.fxlm.dequantize(codes, scale, None, None, 8, [1, 4], torch.float32, "none")
    }


CASES: dict[str, tuple[Convert, dict[str, tuple[int, ...]]]] = {
    "cast": (lambda r: {"w": r["a"].double().float()}, {"a": (8, 12)}),
    "cat": (lambda r: {"w": torch.cat([r["a"], r["b"]])}, {"a": (3, 12), "b": (5, 12)}),
    "cat across": (lambda r: {"w": torch.cat([r["a"], r["b"]], 1)}, {"a": (8, 4), "b": (8, 8)}),
    "stack": (lambda r: {"w": torch.stack([r["a"], r["b"]])}, {"a": (8, 12), "b": (8, 12)}),
    "transpose": (lambda r: {"w": r["a"].t()}, {"a": (12, 8)}),
    "split": (lambda r: {"w": r["a"].split(8)[1]}, {"a": (24, 12)}),
    "slice": (lambda r: {"w": r["a"][4:12, 2:]}, {"a": (16, 14)}),
    "view": (lambda r: {"w": r["a"].view(8, 12)}, {"a": (2, 4, 12)}),
    "scaled": (lambda r: {"w": r["a"] * r["b"]}, {"a": (8, 12), "b": (8, 1)}),
    "dequantize": (dequantized, {"a": (8, 12), "b": (8, 3)}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dim", [0, 1])
def test_a_part_is_what_slicing_the_whole_gives(program: Program, name: str, dim: int) -> None:
    convert, shapes = CASES[name]
    raw = values(shapes)
    program = program.copy()
    made = graft_weights(program, convert, {n: (torch.float32, s) for n, s in shapes.items()})
    whole, total = evaluate(program, made["w"], raw)
    length = whole.shape[dim] // 2 if whole.shape[dim] % 8 == 0 or dim == 0 else 4
    node = WeightParts(program).take(made["w"], dim, length, length)
    part, read = evaluate(program, node, raw)
    torch.testing.assert_close(part, whole.narrow(dim, length, length))
    assert read < total
    assert tuple(node.meta["val"].shape) == tuple(part.shape)


def test_what_no_rule_passes_is_cut_behind_it(program: Program) -> None:
    program = program.copy()
    shapes = {"a": (torch.float32, (8, 12))}
    made = graft_weights(program, lambda r: {"w": r["a"].cumsum(0)}, shapes)
    node = WeightParts(program).take(made["w"], 0, 4, 4)
    assert node.target is torch.ops.aten.slice.Tensor
    assert node.args[0] is made["w"]


def test_half_a_block_of_scales_is_not_cut_out(program: Program) -> None:
    program = program.copy()
    shapes = {"a": (torch.float32, (8, 12)), "b": (torch.float32, (8, 3))}
    made = graft_weights(program, dequantized, shapes)
    node = WeightParts(program).take(made["w"], 1, 6, 6)
    assert node.target is torch.ops.aten.slice.Tensor
