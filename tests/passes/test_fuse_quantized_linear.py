"""fuse_quantized_linear: it fires, it equals, it stays away."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch

from fxlm.compiler import pipeline
from fxlm.compiler.program import Program
from fxlm.compiler.schemes import SCHEMES
from fxlm.passes.cleanup import cleanup
from fxlm.passes.fuse_gate_up import fuse_gate_up
from fxlm.passes.fuse_qkv import fuse_qkv
from fxlm.passes.fuse_quantized_linear import fuse_quantized_linear
from fxlm.passes.quantize import quantize
from tests.programs import IDS, captured, configured, run_dense

aten = torch.ops.aten
fxlm = torch.ops.fxlm


def merged(scheme: str, model_type: str = "llama", **overrides: object) -> Program:
    rounding = configured(quantize, quantization=scheme)
    column = [cleanup, rounding, fuse_qkv, fuse_gate_up]
    return pipeline.run(captured(model_type, **overrides), column)


def test_fires_on_every_quantized_linear() -> None:
    program = pipeline.run(merged("int8"), [fuse_quantized_linear])
    assert program.log[-1].rewrites == 8  # qkv, o, gate-up, down, twice
    assert len(program.find(fxlm.quantized_linear.default)) == 8
    assert not program.find(torch.ops.fxlm.dequantize.default)
    assert len(program.linears()) == 1  # the head


@pytest.mark.parametrize(("model_type", "scheme"), [
    ("llama", "int8wo"), ("llama", "int4-g32"), ("llama", "fp8"), ("llama", "fp8-block"),
    ("qwen2", "int4-g32"), ("opt", "int8wo"), ("mixtral", "int8wo"),
])  # fmt: skip
def test_equals(model_type: str, scheme: str) -> None:
    program = merged(scheme, model_type)
    expected = run_dense(program, IDS)
    pipeline.run(program, [fuse_quantized_linear])
    assert program.log[-1].rewrites > 0
    torch.testing.assert_close(run_dense(program, IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", [s.name for s in SCHEMES.values() if s.activation == "int8"])
def test_rounding_inputs_changes_little(scheme: str) -> None:
    program = merged(scheme)
    expected = run_dense(program, IDS)
    found = run_dense(pipeline.run(program, [fuse_quantized_linear]), IDS)
    relative = float((found - expected).norm() / expected.norm())
    assert 1e-4 < relative < 0.05


def test_a_tied_embedding_reads_the_one_copy() -> None:
    program = merged("int8wo,head=int8wo", tie_word_embeddings=True)
    expected = run_dense(program, IDS)
    pipeline.run(program, [fuse_quantized_linear])
    (rows,) = program.find(fxlm.quantized_rows.default)
    head = program.find(fxlm.quantized_linear.default)[-1]
    assert rows.args[:3] == head.args[1:4]
    torch.testing.assert_close(run_dense(program, IDS), expected, rtol=1e-4, atol=1e-4)


def _stays(program: Program, weight: torch.fx.Node, reason: str) -> None:
    count = len(program.find(torch.ops.fxlm.dequantize.default))
    pipeline.run(program, [fuse_quantized_linear])
    assert program.log[-1].rewrites == count - 1
    assert program.find(torch.ops.fxlm.dequantize.default) == [weight]
    assert reason in program.misses[-1]


def test_stays_away_from_a_weight_that_serves_elsewhere() -> None:
    program = merged("int8")
    linear = program.linears("down_proj")[0]
    weight: Any = linear.args[1]
    with program.graph.inserting_before(linear.next):
        total = program.call(aten.sum.default, weight, like=linear)
        moved = program.call(aten.add.Tensor, linear, total, like=linear)
    linear.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
    _stays(program, weight, "serves aten.sum.default too")


def test_stays_away_from_odd_groups() -> None:
    program = merged("int8")
    weight = program.linears("down_proj")[0].args[1]
    assert isinstance(weight, torch.fx.Node)
    linear = next(iter(weight.users))
    source: Any = weight.args[0].args[0].args[0]  # type: ignore[union-attr]
    with program.graph.inserting_before(weight):
        both = program.call(fxlm.quantize_int.default, source, 8, 12, True, like=linear)
        codes, scale = (program.call(operator.getitem, both, i, like=linear) for i in range(2))
    weight.args = (codes, scale, *weight.args[2:5], [1, 12], *weight.args[6:])
    _stays(program, weight, "groups of 12 inputs")


def test_stays_away_from_three_dimensions() -> None:
    program = merged("int8")
    linear = program.linears("down_proj")[0]
    weight: Any = linear.args[1]
    with program.graph.inserting_before(weight):
        parts = [program.call(aten.unsqueeze.default, a, 0, like=linear) for a in weight.args[:2]]
    weight.args = (*parts, *weight.args[2:])
    with program.graph.inserting_before(linear):
        flat = program.call(aten.squeeze.dim, weight, 0, like=linear)
    linear.args = (linear.args[0], flat)
    program.propagate()
    _stays(program, weight, "it has 3 dimensions")
