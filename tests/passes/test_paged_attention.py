"""paged_attention: every attention is paged, and computes the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxlm.compiler import pipeline
from fxlm.compiler.errors import InvalidOption
from fxlm.compiler.program import ancestors
from fxlm.passes.cleanup import cleanup
from fxlm.passes.paged_attention import paged_attention
from tests.passes.options import with_options
from tests.programs import captured


def test_paging_replaces_every_attention_and_adds_two_caches_a_layer() -> None:
    program = pipeline.run(captured(), [cleanup, paged_attention])
    assert program.stage == "paged"
    assert len(program.placeholders("cache")) == 4
    assert not program.find(torch.ops.fxlm.attention.default)
    spec = program.caches[0]
    assert (spec.num_kv_heads, spec.key_dim, spec.value_dim) == (2, 16, 16)
    assert spec.bytes_per_token == 2 * 32 * 4


def test_the_cache_may_have_another_type() -> None:
    item = replace(paged_attention, options={"cache_dtype": torch.bfloat16})
    program = pipeline.run(captured(), [cleanup, item])
    assert program.caches[1].dtype is torch.bfloat16
    assert program.placeholders("cache")[-1].meta["val"].dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_cache_of_codes_has_room_for_scales(dtype: torch.dtype) -> None:
    program = pipeline.run(captured(), [cleanup, with_options(paged_attention, cache_dtype=dtype)])
    assert program.caches[0].bytes_per_token == 2 * 2 * (16 + 4)
    cache = program.placeholders("cache")[0].meta["val"]
    assert (cache.dtype, cache.shape[3]) == (dtype, 20)
    assert program.attentions()[0].meta["val"].shape[3] == 16


def test_heads_that_codes_cannot_be_packed_for_are_refused() -> None:
    item = with_options(paged_attention, cache_dtype=torch.int8)
    with pytest.raises(InvalidOption, match="heads of size 18"):
        pipeline.run(captured(head_dim=18), [cleanup, item])


def test_scales_of_the_checkpoint_are_weights_of_their_layer() -> None:
    raw = tuple((f"layers.1.{x}_scale", torch.bfloat16, ()) for x in "kv")
    item = with_options(paged_attention, cache_dtype=torch.float8_e4m3fn, scales={1: raw})
    program = pipeline.run(captured(), [cleanup, item])
    first, second = program.attentions()
    assert first.args[-2:] == (None, None)
    fixed = program.weight_only()
    for node, (name, *_) in zip(second.args[-2:], raw, strict=True):
        assert node in fixed
        assert (node.meta["val"].dtype, tuple(node.meta["val"].shape)) == (torch.float32, (1,))
        assert name in {program.inputs[n.name].source for n in ancestors([node])
                        if n.op == "placeholder"}  # fmt: skip


def test_settings_of_a_layer_are_kept() -> None:
    program = pipeline.run(captured("gemma2"), [cleanup, paged_attention])
    windows = [n.args[10] for n in program.attentions()]
    caps = [n.args[12] for n in program.attentions()]
    assert sorted(windows) == [0, 8]
    assert caps == [50.0, 50.0]


def test_stays_away_from_a_paged_program() -> None:
    program = pipeline.run(captured(), [cleanup, paged_attention])
    before = len(program.graph.nodes)
    pipeline.run(program, [replace(paged_attention, stage=None)])
    assert program.log[-1].rewrites == 0
    assert len(program.graph.nodes) == before
