"""bind_checkpoint: parameters become code over the tensors of a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from fxlm.compiler import pipeline
from fxlm.compiler.errors import PassError
from fxlm.compiler.hoist import hoist
from fxlm.compiler.program import Program
from fxlm.passes.bind_checkpoint import bind_checkpoint
from tests.passes.options import plain_column
from tests.programs import captured

Types = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def parameters(program: Program) -> Types:
    found = {}
    for node in program.placeholders("weight"):
        value = node.meta["val"]
        found[program.inputs[node.name].source] = (value.dtype, tuple(value.shape))
    return found


def bind(program: Program, raw: Types, convert: object) -> Program:
    options = {"convert": convert, "raw": raw}
    return pipeline.run(program, [replace(bind_checkpoint, options=options)])


def same(raw: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return raw


def test_renames() -> None:
    program = captured()
    raw = {"file." + name: kind for name, kind in parameters(program).items()}

    def convert(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.removeprefix("file."): tensor for name, tensor in given.items()}

    bind(program, raw, convert)
    assert set(parameters(program)) == set(raw)


def test_casts_to_the_type_of_the_program() -> None:
    program = captured()
    raw = {name: (torch.bfloat16, shape) for name, (_, shape) in parameters(program).items()}
    bind(program, raw, same)
    casts = program.find(torch.ops.aten.to.dtype)
    assert sum(n.args[0] in program.placeholders("weight") for n in casts) == len(raw)


def test_stacking_becomes_graph_code_that_runs_while_loading() -> None:
    program = captured()
    wanted = parameters(program)
    name = "model.layers.0.mlp.up_proj.weight"
    dtype, (rows, columns) = wanted.pop(name)
    raw = {**wanted, "a": (dtype, (rows // 2, columns)), "b": (dtype, (rows // 2, columns))}

    def convert(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        both = torch.cat([given.pop("a"), given.pop("b")])
        return {**given, name: both}

    bind(program, raw, convert)
    pipeline.run(program, plain_column())
    assert any(n.target is torch.ops.aten.cat.default for n in hoist(program).load.nodes)


def test_a_missing_tensor_is_named() -> None:
    program = captured()
    raw = parameters(program)
    del raw["model.norm.weight"]
    with pytest.raises(PassError, match=r"no tensor of the checkpoint gives model\.norm\.weight"):
        bind(program, raw, same)


def test_a_wrong_shape_is_named() -> None:
    program = captured()
    raw = parameters(program)
    raw["model.norm.weight"] = (torch.float32, (63,))
    with pytest.raises(
        PassError, match=r"model\.norm\.weight is \[64\], the checkpoint has \[63\]"
    ):
        bind(program, raw, same)
