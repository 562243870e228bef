"""pack_linears: it fires, it equals, it stays away; the column holds it where it pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxlm.compiler import pipeline
from fxlm.compiler.hoist import hoist
from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program
from fxlm.passes.cleanup import cleanup
from fxlm.passes.column import default_column
from fxlm.passes.fuse_gate_up import fuse_gate_up
from fxlm.passes.fuse_qkv import fuse_qkv
from fxlm.passes.pack_linears import pack_linears
from tests.passes.options import plain_column
from tests.programs import IDS, captured, run_dense

aten = torch.ops.aten
fxlm = torch.ops.fxlm
MERGED = [cleanup, fuse_qkv, fuse_gate_up]


def test_fires_on_every_linear() -> None:
    program = pipeline.run(captured(), MERGED)
    before = len(program.linears())
    pipeline.run(program, [pack_linears])
    assert program.log[-1].rewrites == before == 9
    assert not program.linears()
    assert len(program.find(fxlm.packed_linear.default)) == before
    assert len(program.find(fxlm.pack_weight.default)) == before


def test_fires_on_the_layers_of_gpt2() -> None:
    program = pipeline.run(captured("gpt2"), [cleanup, pack_linears])
    assert program.log[-1].rewrites == 2 * 4 + 1
    assert not program.find(aten.addmm.default, aten.linear.default)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_fires_on_experts(model_type: str) -> None:
    program = pipeline.run(captured(model_type), [cleanup, pack_linears])
    assert not program.find(fxlm.grouped_linear.default)
    assert len(program.find(fxlm.packed_grouped_linear.default)) == 2 * 2


def test_a_tied_embedding_reads_the_one_copy() -> None:
    program = pipeline.run(captured(tie_word_embeddings=True), [cleanup, pack_linears])
    (rows,) = program.find(fxlm.packed_rows.default)
    head = program.find(fxlm.packed_linear.default)[-1]
    assert rows.args[0] is head.args[1]
    assert not program.find(aten.embedding.default)


def test_an_embedding_of_its_own_stays() -> None:
    program = pipeline.run(captured(tie_word_embeddings=False), [cleanup, pack_linears])
    assert len(program.find(aten.embedding.default)) == 1
    assert not program.find(fxlm.packed_rows.default)


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "gemma2", "opt", "mixtral", "gpt_oss", "gpt2"]
)
@pytest.mark.parametrize("tied", [False, True])
def test_equals(model_type: str, tied: bool) -> None:
    program = pipeline.run(captured(model_type, tie_word_embeddings=tied), MERGED)
    expected = run_dense(program, IDS)
    pipeline.run(program, [pack_linears])
    assert program.log[-1].rewrites > 0
    torch.testing.assert_close(run_dense(program, IDS), expected, rtol=1e-5, atol=1e-5)


def test_packing_happens_while_loading_and_nothing_is_held_twice() -> None:
    program = pipeline.run(captured(tie_word_embeddings=True), plain_column())
    cut = hoist(program)
    assert len([n for n in cut.load.nodes if n.target is fxlm.pack_weight.default]) == 9
    assert not [n for n in cut.step.nodes if n.target is fxlm.pack_weight.default]
    raw = sum(n.meta["val"].numel() for n in program.placeholders("weight"))
    specs = cut.step_inputs
    held = [n for n in cut.step.nodes if n.name in specs and specs[n.name].role == "weight"]
    constants = sum(v.numel() for v in program.constants.values())
    # The tiny model's sizes are whole panels, so that nothing is padded.
    assert sum(n.meta["val"].numel() for n in held) == raw + constants


def test_stays_away_from_a_weight_that_depends_on_tokens() -> None:
    program = pipeline.run(captured(), [cleanup])
    linear = program.linears("down_proj")[0]
    x: Any = linear.args[0]
    with program.graph.inserting_before(linear):
        moving = program.call(aten.mean.dim, x, [0, 1], like=linear)
        weight = program.call(aten.add.Tensor, linear.args[1], moving, like=linear)
    linear.args = (x, weight)
    _stays(program, linear, "depends on tokens")


def test_stays_away_from_a_weight_that_serves_elsewhere() -> None:
    program = pipeline.run(captured(), [cleanup])
    linear = program.linears("down_proj")[0]
    weight: Any = linear.args[1]
    with program.graph.inserting_before(linear.next):
        norm = program.call(aten.sum.default, weight, like=linear)
        moved = program.call(aten.add.Tensor, linear, norm, like=linear)
    linear.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
    _stays(program, linear, "serves aten.sum.default too")


def test_stays_away_from_other_types() -> None:
    program = pipeline.run(captured(), [cleanup])
    linear = program.linears("down_proj")[0]
    with program.graph.inserting_before(linear):
        args = [program.call(aten.to.dtype, a, torch.float64, like=linear) for a in linear.args]
        wide = program.call(aten.linear.default, *args, like=linear)
        narrow = program.call(aten.to.dtype, wide, torch.float32, like=linear)
    program.replace(linear, narrow)
    _stays(program, wide, "float64")


def test_stays_away_from_an_addmm_that_adds_more_than_a_bias() -> None:
    program = pipeline.run(captured("gpt2"), [cleanup])
    layer = program.find(aten.addmm.default)[0]
    layer.kwargs = {"beta": 2}
    pipeline.run(program, [pack_linears])
    assert program.find(aten.addmm.default) == [layer]
    assert "more than a bias" in program.misses[-1]


def test_stays_away_from_experts_that_serve_elsewhere() -> None:
    program = pipeline.run(captured("mixtral"), [cleanup])
    layer = program.find(fxlm.grouped_linear.default)[0]
    weight: Any = layer.args[1]
    with program.graph.inserting_before(layer.next):
        norm = program.call(aten.sum.default, weight, like=layer)
        moved = program.call(aten.add.Tensor, layer, norm, like=layer)
    layer.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
    pipeline.run(program, [pack_linears])
    assert program.find(fxlm.grouped_linear.default) == [layer]


def _stays(program: Program, linear: torch.fx.Node, reason: str) -> None:
    count = len(program.linears())
    pipeline.run(program, [pack_linears])
    assert program.log[-1].rewrites == count - 1
    assert program.linears() == [linear]
    assert reason in program.misses[-1]


def test_a_pass_that_names_no_place_still_finds_linears() -> None:
    @graph_pass
    def mine(program: Program) -> int:
        return 0

    names = [p.name for p in pipeline.order(default_column(), [mine])]
    assert names[-5:] == [
        "mine",
        "split_rope",
        "fuse_quantized_linear",
        "pack_linears",
        "fuse_activation",
    ]
