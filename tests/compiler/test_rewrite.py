"""Helpers for passes: what they find, insert and replace, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from fxlm.compiler import pipeline
from fxlm.compiler.errors import PassError
from fxlm.compiler.program import Program
from fxlm.compiler.rewrite import (
    insert_after,
    insert_before,
    layer_paths,
    module_input,
    module_output,
    replace_pattern,
    wrap_linears,
)
from fxlm.passes.cleanup import cleanup
from tests.programs import IDS, captured, run_dense

aten = torch.ops.aten


def program_of(model_type: str = "llama") -> Program:
    return pipeline.run(captured(model_type), [cleanup])


def doubled(program: Program, value: fx.Node) -> fx.Node:
    return program.call(aten.mul.Scalar, value, 2.0, like=value)


@pytest.mark.parametrize(
    ("model_type", "path"), [("llama", "model.layers.1"), ("gpt_neox", "gpt_neox.layers.1")]
)
def test_layers_are_found(model_type: str, path: str) -> None:
    paths = layer_paths(program_of(model_type))
    assert len(paths) == 2
    assert paths[1] == path


def test_the_output_of_one_layer_is_the_input_of_the_next() -> None:
    program = program_of()
    assert module_output(program, "model.layers.0") is module_input(program, "model.layers.1")


def test_a_change_behind_a_module_reaches_all_that_follows() -> None:
    program = program_of()
    expected = run_dense(program, IDS)
    insert_after(program, "lm_head", doubled)
    torch.testing.assert_close(run_dense(program, IDS), 2 * expected)


def test_a_change_before_a_module_reaches_it_alone() -> None:
    program = program_of()
    value = module_input(program, "model.layers.1.mlp")
    users = set(value.users)
    new = insert_before(program, "model.layers.1.mlp", doubled)
    assert set(new.users) == users - {new}
    residual = module_input(program, "model.layers.1")
    insert_before(program, "model.layers.1", doubled)
    assert len(residual.users) == 1


def test_every_matching_linear_is_wrapped() -> None:
    program = program_of()
    assert wrap_linears(program, r"mlp\.down_proj$", doubled) == 2
    assert len(program.find(aten.mul.Scalar)) == 2
    program.graph.lint()


def silu_gate(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return aten.mul.Tensor(aten.silu.default(x), y)  # type: ignore[no-any-return]


def test_a_pattern_is_replaced_by_what_equals_it() -> None:
    def slowly(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return aten.mul.Tensor(aten.mul.Tensor(x, aten.sigmoid.default(x)), y)  # type: ignore[no-any-return]

    program = program_of()
    expected = run_dense(program, IDS)
    assert replace_pattern(program, silu_gate, slowly) == 2
    program.eliminate_dead_code()
    assert not program.find(aten.silu.default)
    torch.testing.assert_close(run_dense(program, IDS), expected)


def test_a_pattern_stays_away_elsewhere() -> None:
    program = program_of()
    assert replace_pattern(program, silu_gate, lambda x, y: y, where=r"layers\.7") == 0
    assert replace_pattern(program_of("gpt_neox"), silu_gate, lambda x, y: y) == 0


def test_an_unknown_module_is_refused_with_the_nearest() -> None:
    with pytest.raises(PassError, match=r"'model.layer.1'; did you mean 'model.layers.1'"):
        module_output(program_of(), "model.layer.1")


def test_a_change_of_shape_is_refused() -> None:
    def first(program: Program, value: fx.Node) -> fx.Node:
        return program.call(aten.select.int, value, 0, 0, like=value)

    with pytest.raises(PassError, match="cannot be replaced by"):
        insert_after(program_of(), "model.layers.0", first)


def test_arguments_of_pattern_and_replacement_must_agree() -> None:
    with pytest.raises(PassError, match=r"\['x', 'y'\]"):
        replace_pattern(program_of(), silu_gate, lambda a: a)
