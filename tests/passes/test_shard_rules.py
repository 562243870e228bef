"""shard_rules: the layout that an op gives for what it is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxlm.compiler import ops, pipeline
from fxlm.passes import shard_rules
from fxlm.passes.cleanup import cleanup
from fxlm.passes.layout import OWNED, PARTIAL, ROWS, WHOLE, Layout, split
from fxlm.passes.sharder import Sharder
from tests.programs import captured

aten = torch.ops.aten


@pytest.fixture(scope="module")
def whole() -> Any:
    ops.load()
    return pipeline.run(captured("llama", num_hidden_layers=1), [cleanup])


# op, its arguments ("x" is the value [1, T, 64] in question, "y" another, whole one), layouts.
CASES: list[tuple[Any, list[Any], Layout, Layout]] = [
    (aten.silu.default, ["x"], split(2, 2), split(2, 2)),
    (aten.mul.Tensor, ["x", "y"], split(2, 2), split(2, 2)),
    (aten.mul.Tensor, ["x", "y"], PARTIAL, PARTIAL),
    (aten.add.Tensor, ["x", "y"], PARTIAL, WHOLE),
    (aten.silu.default, ["x"], PARTIAL, WHOLE),
    (aten.neg.default, ["x"], PARTIAL, PARTIAL),
    (aten.silu.default, ["x"], ROWS, OWNED),
    (aten.mul.Tensor, ["x", "y"], ROWS, ROWS),
    (aten.unsqueeze.default, ["x", 0], split(2, 2), split(3, 2)),
    (aten.transpose.int, ["x", 1, 2], split(2, 2), split(1, 2)),
    (aten.slice.Tensor, ["x", 1, 0, 1], split(2, 2), split(2, 2)),
    (aten.slice.Tensor, ["x", 2, 0, 8], split(2, 2), WHOLE),
    (aten.cat.default, [["x", "y"], 1], split(2, 2), split(2, 2)),
    (aten.cat.default, [["x", "y"], 2], split(2, 2), WHOLE),
    (aten.stack.default, [["x", "x"], 0], split(2, 2), split(3, 2)),
    (aten.mean.dim, ["x", [1]], split(2, 2), split(1, 2)),
    (aten.sum.dim_IntList, ["x", [2]], split(2, 2), PARTIAL),
    (aten.softmax.int, ["x", 1], split(2, 2), split(2, 2)),
    (aten.softmax.int, ["x", 2], split(2, 2), WHOLE),
    (aten.cumsum.default, ["x", 2], split(2, 2), WHOLE),
]


@pytest.mark.parametrize(("target", "args", "given", "expected"), CASES)
def test_layouts(whole: Any, target: Any, args: list[Any], given: Layout, expected: Layout) -> None:
    program = whole.copy()
    sharder = Sharder(program, ranks=2, rank=1)
    named = {"x": program.linears("o_proj")[0], "y": program.linears("down_proj")[0]}
    last = program.output()

    def put(value: Any) -> Any:
        return [put(v) for v in value] if isinstance(value, list) and "x" in value else (
            named.get(value, value) if isinstance(value, str) else value
        )  # fmt: skip

    with program.graph.inserting_before(last):
        node = program.call(target, *(put(a) for a in args), like=named["x"])
    sharder.whole_sizes[node] = sharder.shape(node)
    sharder.layouts[named["x"]] = given
    assert shard_rules.apply(sharder, node) == expected
