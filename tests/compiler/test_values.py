"""values: calls alike are evaluated once, and give what each would give by itself."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from fxlm.compiler import values
from fxlm.compiler.outline import outline
from fxlm.compiler.program import Program
from fxlm.compiler.values import evaluate
from tests.programs import captured

aten = torch.ops.aten


@pytest.fixture(scope="module")
def program() -> Program:
    return captured("llama", num_hidden_layers=2)


def weights(program: Program) -> list[fx.Node]:
    """The weights of both norms of the first layer, which are of one type."""
    found = program.placeholders("weight")
    return [n for n in found if "layers.0" in program.inputs[n.name].source
            and "layernorm" in program.inputs[n.name].source]  # fmt: skip


def call(program: Program, target: object, *args: object, **kwargs: object) -> fx.Node:
    with program.graph.inserting_before(program.output()):
        return program.call(target, *args, like=program.output(), **kwargs)


def test_calls_alike_are_evaluated_once(program: Program) -> None:
    left, right = weights(program)
    assert left.meta["val"] is not right.meta["val"]
    one, other = call(program, aten.neg.default, left), call(program, aten.neg.default, right)
    assert one.meta["val"] is other.meta["val"]


@pytest.mark.parametrize(
    ("one", "other"), [((1,), (1.0,)), ((2,), (True,))], ids=["a float", "a truth value"]
)
def test_numbers_that_are_equal_and_of_another_type_are_told_apart(
    program: Program, one: tuple[object], other: tuple[object]
) -> None:
    weight = weights(program)[0]
    with program.graph.inserting_before(program.output()):
        whole = program.call(aten.ones_like.default, weight, dtype=torch.int64, like=weight)
    types = [call(program, aten.mul.Scalar, whole, *n).meta["val"].dtype for n in (one, other)]
    wanted = [torch.mul(torch.ones(2, dtype=torch.int64), *n).dtype for n in (one, other)]  # type: ignore[arg-type]
    assert types == wanted


def test_a_view_is_of_its_own_tensor(program: Program) -> None:
    views = [call(program, aten.unsqueeze.default, w, 0).meta["val"] for w in weights(program)]
    storages = [v.untyped_storage()._cdata for v in views]
    assert storages == [w.meta["val"].untyped_storage()._cdata for w in weights(program)]


def test_a_size_that_depends_on_values_is_each_tensor_s_own(program: Program) -> None:
    first, second = (call(program, aten.nonzero.default, w).meta["val"] for w in weights(program))
    assert first.shape[0].node.expr != second.shape[0].node.expr


def test_a_value_stays_where_the_arguments_are_the_same(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = call(program, aten.neg.default, weights(program)[0])
    monkeypatch.setattr(values, "_value", None)
    evaluate(node, {}, lambda: None)  # type: ignore[arg-type, return-value]
    assert node.meta["val"].shape == weights(program)[0].meta["val"].shape


def test_inputs_of_a_region_are_tensors_of_their_own() -> None:
    """Inductor takes two inputs that are one tensor for one."""
    graph = fx.Graph()
    value = captured("llama").placeholders("weight")[0].meta["val"]
    left, right = graph.placeholder("left"), graph.placeholder("right")
    total = graph.call_function(aten.add.Tensor, (left, right))
    for node in (left, right, total):
        node.meta["val"] = value
    graph.output((total,))
    (region,) = outline(graph).regions
    one, other = (n.meta["val"] for n in region.graph.nodes if n.op == "placeholder")
    assert one is not other
    assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
