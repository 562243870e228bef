"""fuse_activation: it fires, it equals, it stays away."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxlm.compiler import pipeline
from fxlm.compiler.capture import capture
from fxlm.compiler.program import Program
from fxlm.models.build import build_model
from fxlm.models.tiny import tiny_config
from fxlm.passes.cleanup import cleanup
from fxlm.passes.fuse_activation import fuse_activation
from fxlm.passes.fuse_gate_up import fuse_gate_up
from fxlm.passes.fuse_quantized_linear import fuse_quantized_linear
from fxlm.passes.pack_linears import pack_linears
from fxlm.passes.quantize import quantize
from tests.passes.sharding import rank_of
from tests.programs import IDS, captured, configured, facts, run_dense

aten = torch.ops.aten
fxlm = torch.ops.fxlm
MLP_WIDTHS = {"llama": 96, "phi3": 96, "opt": 96, "bloom": 256}


def prepared(model_type: str = "llama", scheme: str = "int8wo", **overrides: object) -> Program:
    rounding = configured(quantize, quantization=scheme)
    column = [cleanup, rounding, fuse_gate_up, fuse_quantized_linear]
    return pipeline.run(captured(model_type, **overrides), column)


def packed(model_type: str = "llama", **overrides: object) -> Program:
    """Layers over packed weights that are not quantized."""
    return pipeline.run(captured(model_type, **overrides), [cleanup, fuse_gate_up, pack_linears])


PREPARED = {"quantized": prepared, "packed": packed}


def epilogues(program: Program) -> list[Any]:
    quantized = program.find(fxlm.quantized_linear.default)
    plain = program.find(fxlm.packed_linear.default)
    return [n.args[10] for n in quantized if len(n.args) > 10] + [
        n.args[4] for n in plain if len(n.args) > 4
    ]


@pytest.mark.parametrize(("model_type", "epilogue"), [
    ("llama", "silu_and_mul"), ("gemma2", "gelu_tanh_and_mul"), ("phi3", "silu_and_mul"),
    ("gpt_neox", "gelu"), ("starcoder2", "gelu_tanh"), ("opt", "relu"),
    ("phi", "gelu_tanh"), ("bloom", "gelu_tanh"),  # spelled out, each in its way
])  # fmt: skip
@pytest.mark.parametrize("kind", PREPARED)
def test_fires_and_equals(kind: str, model_type: str, epilogue: str) -> None:
    program = PREPARED[kind](model_type)
    expected = run_dense(program, IDS)
    pipeline.run(program, [fuse_activation])
    assert epilogues(program) == [epilogue] * 2
    assert not program.find(aten.silu.default, aten.gelu.default, aten.relu.default)
    torch.testing.assert_close(run_dense(program, IDS), expected, rtol=1e-4, atol=1e-4)


def test_fires_behind_the_view_of_a_conv1d() -> None:
    program = packed("gpt2")
    expected = run_dense(program, IDS)
    pipeline.run(program, [fuse_activation])
    assert epilogues(program) == ["gelu_tanh"] * 2
    assert not program.find(aten.tanh.default)
    torch.testing.assert_close(run_dense(program, IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("intermediate_size", [96, 50])  # 50: the last panel is not full
def test_only_a_gated_weight_is_packed_so(intermediate_size: int) -> None:
    program = packed("llama", intermediate_size=intermediate_size)
    expected = run_dense(program, IDS)
    pipeline.run(program, [fuse_activation])
    for layer in program.find(fxlm.packed_linear.default):
        gated = layer.args[4:] == ("silu_and_mul",)
        assert gated == (layer.args[3] == 2 * intermediate_size)
        assert layer.args[1].args[1:] == ((True,) if gated else ())  # type: ignore[union-attr]
    torch.testing.assert_close(run_dense(program, IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "bloom"])
def test_fires_in_bfloat16(model_type: str) -> None:
    model = build_model(tiny_config(model_type), torch.bfloat16)
    program = capture(model, facts(model_type))
    pipeline.run(program, [cleanup, fuse_gate_up, pack_linears, fuse_activation])
    assert len(epilogues(program)) == 2


@pytest.mark.parametrize("scheme", ["int4-g32", "fp8-channel"])
@pytest.mark.parametrize("intermediate_size", [96, 50])  # 50: the last panel is not full
def test_gates_of_every_scheme(scheme: str, intermediate_size: int) -> None:
    program = prepared("llama", f"none,gate_proj={scheme},up_proj={scheme}",
                       intermediate_size=intermediate_size)  # fmt: skip
    expected = run_dense(program, IDS)
    pipeline.run(program, [fuse_activation])
    assert epilogues(program) == ["silu_and_mul"] * 2
    torch.testing.assert_close(run_dense(program, IDS), expected, rtol=1e-4, atol=1e-4)


def test_a_gate_by_itself() -> None:
    """Blocks of 128 outputs cannot be merged where a layer has 96."""
    program = pipeline.run(prepared("llama", "fp8-block"), [fuse_activation])
    assert epilogues(program) == ["silu"] * 2


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("model_type", "epilogue"), [
    ("llama", "silu_and_mul"), ("phi3", "silu_and_mul"), ("opt", "relu"), ("bloom", "gelu_tanh"),
])  # fmt: skip
def test_fires_on_the_part_of_a_rank(model_type: str, epilogue: str, quantized: bool) -> None:
    """What ranks share comes behind the activation: its inputs are cut by columns."""
    program = rank_of(model_type, ranks=2, rank=1)
    rounding = [configured(quantize, quantization="int8wo")] if quantized else []
    column = [*rounding, fuse_gate_up, fuse_quantized_linear, pack_linears, fuse_activation]
    pipeline.run(program, column)
    assert epilogues(program) == [epilogue] * 2
    layers = program.find(fxlm.quantized_linear.default, fxlm.packed_linear.default)
    widths = {n.meta["val"].shape[-1] for n in layers}
    assert MLP_WIDTHS[model_type] // 2 in widths


@pytest.mark.parametrize("kind", PREPARED)
def test_stays_away_from_another_function(kind: str) -> None:
    program = pipeline.run(PREPARED[kind](hidden_act="quick_gelu"), [fuse_activation])
    assert not epilogues(program)


@pytest.mark.parametrize("kind", PREPARED)
def test_stays_away_from_a_clamped_gate(kind: str) -> None:
    """The activation is fused only if nothing stands between it and the layer."""
    program = PREPARED[kind]("opt")
    first = program.find(aten.relu.default)[0]
    with program.graph.inserting_before(first):
        clamped = program.call(aten.clamp.default, first.args[0], None, 50.0, like=first)
    first.args = (clamped,)
    pipeline.run(program, [fuse_activation])
    assert epilogues(program) == ["relu"]


@pytest.mark.parametrize("kind", PREPARED)
@pytest.mark.parametrize("model_type", ["opt", "llama"])
def test_stays_away_from_sums_that_are_seen_elsewhere(model_type: str, kind: str) -> None:
    program = PREPARED[kind](model_type)
    activation = program.find(aten.relu.default, aten.silu.default)[0]
    program.tap("sums", activation.args[0])  # type: ignore[arg-type]
    pipeline.run(program, [fuse_activation])
    assert len(epilogues(program)) == 1


@pytest.mark.parametrize("kind", PREPARED)
def test_stays_away_from_a_factor_that_is_seen_elsewhere(kind: str) -> None:
    program = PREPARED[kind]()
    product: Any = next(iter(program.find(aten.silu.default)[0].users))
    program.tap("up", product.args[1])
    pipeline.run(program, [fuse_activation])
    assert len(epilogues(program)) == 1


@pytest.mark.parametrize("kind", PREPARED)
def test_stays_away_from_up_before_gate(kind: str) -> None:
    program = PREPARED[kind]()
    silu = program.find(aten.silu.default)[0]
    product: Any = next(iter(silu.users))
    gate, up = silu.args[0], product.args[1]
    silu.args, product.args = (up,), (silu, gate)
    pipeline.run(program, [fuse_activation])
    assert len(epilogues(program)) == 1


def test_stays_away_from_a_view_that_is_seen_elsewhere() -> None:
    """Of a Conv1D, the layer or its view."""
    program = packed("gpt2")
    layers = program.find(fxlm.packed_linear.default)
    first, second, _head = (n for n in layers if n.args[3] == 256)
    program.tap("sums", first)
    program.tap("view", next(iter(second.users)))
    pipeline.run(program, [fuse_activation])
    assert not epilogues(program)


@pytest.mark.parametrize("kind", PREPARED)
def test_stays_away_from_a_gated_weight_that_serves_elsewhere(kind: str) -> None:
    """Its rows are brought into another order."""
    program = PREPARED[kind]()
    layers = program.find(fxlm.quantized_linear.default, fxlm.packed_linear.default)
    layer: Any = next(n for n in layers if n.meta["val"].shape[-1] == 192)
    with program.graph.inserting_before(layer):
        other = program.call(layer.target, *layer.args, like=layer)
    program.tap("again", other)
    pipeline.run(program, [fuse_activation])
    assert len(epilogues(program)) == 1


def test_stays_away_from_a_gated_weight_whose_rows_are_read() -> None:
    """As those of a tied embedding are."""
    program = packed()
    layer: Any = next(n for n in program.find(fxlm.packed_linear.default) if n.args[3] == 192)
    ids = program.find_step_input("input_ids")
    with program.graph.inserting_before(layer):
        rows = program.call(fxlm.packed_rows.default, layer.args[1], ids, 64, like=layer)
    program.tap("rows", rows)
    pipeline.run(program, [fuse_activation])
    assert len(epilogues(program)) == 1


def test_what_serves_elsewhere_may_have_a_function() -> None:
    """It lies as it did."""
    program = packed("opt")
    layer: Any = program.find(aten.relu.default)[0].args[0]
    with program.graph.inserting_before(layer):
        other = program.call(layer.target, *layer.args, like=layer)
    program.tap("again", other)
    pipeline.run(program, [fuse_activation])
    assert epilogues(program) == ["relu"] * 2
