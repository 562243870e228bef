"""quantize: it fires, it equals (its own rounding), it stays away; what users may write."""

from __future__ import annotations

import pytest
import torch

from fxlm.compiler import pipeline
from fxlm.compiler.errors import InvalidOption
from fxlm.compiler.hoist import hoist
from fxlm.compiler.program import Program, module_path
from fxlm.compiler.schemes import SCHEMES
from fxlm.passes.cleanup import cleanup
from fxlm.passes.fuse_qkv import fuse_qkv
from fxlm.passes.fuse_quantized_linear import fuse_quantized_linear
from fxlm.passes.last_tokens import last_tokens
from fxlm.passes.paged_attention import paged_attention
from fxlm.passes.quantize import quantize
from fxlm.passes.quantized_weights import quantized
from fxlm.passes.sample import sample
from tests.programs import IDS, captured, configured, run_dense

LINEAR = torch.ops.aten.linear.default
fxlm = torch.ops.fxlm


def made(scheme: str, model_type: str = "llama", **overrides: object) -> Program:
    program = pipeline.run(captured(model_type, **overrides), [cleanup])
    return pipeline.run(program, [configured(quantize, quantization=scheme)])


def paths(program: Program) -> list[str]:
    """Modules whose weights are quantized."""
    return [module_path(n) for n in program.linears() if quantized(n.args[1])]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fires_on_every_linear_but_the_head(scheme: str) -> None:
    program = made(scheme)
    assert program.log[-1].rewrites == 14
    assert len(paths(program)) == 14
    assert "lm_head" not in paths(program)


@pytest.mark.parametrize(("scheme", "error"), [
    ("int8wo", 0.02), ("int4-g32", 0.3), ("int4", 0.3), ("fp8", 0.1), ("fp8-channel", 0.1),
    ("fp8-block", 0.1),
])  # fmt: skip
def test_equals_but_for_the_rounding(scheme: str, error: float) -> None:
    dense = pipeline.run(captured(), [cleanup])
    expected = run_dense(dense, IDS)
    found = run_dense(made(scheme), IDS)
    relative = float((found - expected).norm() / expected.norm())
    assert 1e-4 < relative < error


def test_rounding_happens_while_loading() -> None:
    column = [fuse_qkv, paged_attention, last_tokens, sample, fuse_quantized_linear]
    program = pipeline.run(made("int4-g32"), column)
    cut = hoist(program)
    ops = (fxlm.quantize_int.default, fxlm.pack_codes.default)
    assert {n.target for n in cut.load.nodes} >= set(ops)
    assert not {n.target for n in cut.step.nodes} & {*ops, torch.ops.fxlm.dequantize.default}


def test_the_last_rule_that_matches_counts() -> None:
    program = made(r"int8,mlp=int4-g32,layers\.1\.=none,head=fp8")
    kinds = {module_path(n): quantized(n.args[1]) for n in program.linears()}
    assert not [path for path, weight in kinds.items() if "layers.1" in path and weight]
    bits = {path: weight.bits for path, weight in kinds.items() if weight}
    assert bits["model.layers.0.mlp.up_proj"] == 4
    assert bits["model.layers.0.self_attn.q_proj"] == 8
    head = kinds["lm_head"]
    assert head is not None
    assert head.block == (0, 0)


def test_a_tied_embedding_stays_tied() -> None:
    program = made("int8wo,head=int8wo", tie_word_embeddings=True)
    (embedding,) = program.find(torch.ops.aten.embedding.default)
    (head,) = program.linears("lm_head")
    assert embedding.args[0] is head.args[1]
    expected = run_dense(program, IDS)
    pipeline.run(program, [fuse_quantized_linear])
    assert program.find(fxlm.quantized_rows.default)
    torch.testing.assert_close(run_dense(program, IDS), expected, rtol=1e-4, atol=1e-4)


def test_an_embedding_of_its_own_stays_dense() -> None:
    program = made("int8,head=int8", tie_word_embeddings=False)
    (embedding,) = program.find(torch.ops.aten.embedding.default)
    assert embedding.args[0] in program.placeholders("weight")
    assert "lm_head" in paths(program)


def test_stays_away_from_routers() -> None:
    program = made("int8", "mixtral")
    assert program.linears("gate$")
    assert not [path for path in paths(program) if path.endswith("gate")]


def test_stays_away_from_weights_quantized_already() -> None:
    program = made("int8,down_proj=none")
    pipeline.run(program, [configured(quantize, quantization="int4-g32")])
    assert program.log[-1].rewrites == 2
    assert {quantized(n.args[1]).bits for n in program.linears("down_proj")} == {4}  # type: ignore[union-attr]


def test_a_weight_of_two_linears_is_quantized_once() -> None:
    program = pipeline.run(captured(), [cleanup])
    first, second = program.linears("q_proj")
    second.args = (second.args[0], first.args[1])
    pipeline.run(program, [configured(quantize, quantization="int8")])
    assert program.log[-1].rewrites == 13
    assert second.args[1] is first.args[1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("int9", "did you mean 'int8'"),
        ("int8,down_proj", "no PATTERN=SCHEME"),
        ("int8,(=int4", "no regular expression"),
        ("int8,nowhere=int4", "fits no linear layer"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, reason: str) -> None:
    with pytest.raises(InvalidOption, match=reason):
        made(text)


def test_nothing_to_quantize_is_an_error() -> None:
    program = made("int8")
    with pytest.raises(InvalidOption, match="nothing can be quantized"):
        pipeline.run(program, [configured(quantize, quantization="int4")])
