"""Quantized weights as nodes: which can be merged, and what they are merged to."""

from __future__ import annotations

import pytest
import torch

from fxlm.compiler import pipeline
from fxlm.compiler.program import Program
from fxlm.passes.cleanup import cleanup
from fxlm.passes.fuse_gate_up import fuse_gate_up
from fxlm.passes.fuse_qkv import fuse_qkv
from fxlm.passes.quantize import quantize
from fxlm.passes.quantized_weights import differing, quantized
from tests.programs import IDS, captured, configured, run_dense

SCHEMES = ["int8", "int4-g32", "fp8", "fp8-channel", "int8,q_proj=none,k_proj=none,v_proj=none"]


def program(scheme: str, **overrides: object) -> Program:
    return pipeline.run(captured(**overrides), [cleanup, configured(quantize, quantization=scheme)])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_merged_in_quantized_form_they_are_the_same(scheme: str) -> None:
    made = program(scheme)
    expected = run_dense(made, IDS)
    pipeline.run(made, [fuse_qkv, fuse_gate_up])
    assert [entry.rewrites for entry in made.log[-2:]] == [2, 2]
    torch.testing.assert_close(run_dense(made, IDS), expected, rtol=1e-4, atol=1e-4)
    merged = [quantized(n.args[1]) for n in made.linears("gate_proj")]
    assert [m is not None and m.shape[0] for m in merged] == [192, 192]
    assert len(made.find(torch.ops.aten.cat.default)) >= 2 * len(merged)


def test_blocks_of_outputs_are_merged_where_they_end_with_a_weight() -> None:
    whole = program("fp8-block", intermediate_size=128)
    pipeline.run(whole, [fuse_gate_up])
    assert whole.log[-1].rewrites == 2
    broken = program("fp8-block", intermediate_size=96)
    weights = [n.args[1] for n in broken.linears(r"layers\.0\.mlp\.(gate|up)_proj")]
    assert "span two weights" in differing(weights)
    pipeline.run(broken, [fuse_gate_up])
    assert broken.log[-1].rewrites == 0


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("int8,k_proj=none", "others are not"),
        ("int8,k_proj=int4-g32", "different ways"),
        ("int8,k_proj=int8wo", "different ways"),
    ],
)
def test_weights_that_differ_are_not_merged(scheme: str, reason: str) -> None:
    made = program(scheme)
    weights = [n.args[1] for n in made.linears(r"layers\.0\.self_attn\.[qkv]_proj")]
    assert reason in differing(weights)
    pipeline.run(made, [fuse_qkv])
    assert made.log[-1].rewrites == 0


@pytest.mark.parametrize("traced", [False, True])
def test_a_cast_of_a_dequantized_weight_is_folded_into_it(traced: bool) -> None:
    made = program("int8")
    linear = made.linears("down_proj")[0]
    source = linear.args[1]
    assert isinstance(source, torch.fx.Node)
    source.update_arg(6, torch.float32)
    made.propagate()
    with made.graph.inserting_before(linear):
        if traced:  # as make_fx writes it
            copy = torch.ops.aten._to_copy.default
            cast = made.call(copy, source, dtype=torch.float64, like=linear)
        else:
            cast = made.call(torch.ops.aten.to.dtype, source, torch.float64, like=linear)
        wide = made.call(torch.ops.aten.to.dtype, linear.args[0], torch.float64, like=linear)
        product = made.call(torch.ops.aten.linear.default, wide, cast, like=linear)
        narrow = made.call(torch.ops.aten.to.dtype, product, torch.float32, like=linear)
    made.replace(linear, narrow)
    expected = run_dense(made, IDS)
    pipeline.run(made, [cleanup])
    weight = quantized(product.args[1])
    assert weight is not None
    assert weight.dtype == torch.float64
    torch.testing.assert_close(run_dense(made, IDS), expected, rtol=1e-5, atol=1e-5)


def test_a_cast_of_a_weight_that_others_use_too_stays() -> None:
    made = program("int8")
    source = made.find(torch.ops.fxlm.dequantize.default)[0]
    linear = next(iter(source.users))
    with made.graph.inserting_before(linear.next):
        cast = made.call(torch.ops.aten.to.dtype, source, torch.float64, like=linear)
        total = made.call(torch.ops.aten.sum.default, cast, like=linear)
        moved = made.call(torch.ops.aten.add.Tensor, linear, total, like=linear)
    linear.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
    pipeline.run(made, [cleanup])
    assert cast in made.graph.nodes
