"""paged_attention: every attention is paged, and computes the same."""

from __future__ import annotations

from dataclasses import replace

import torch

from fxlm.compiler import pipeline
from fxlm.passes.cleanup import cleanup
from fxlm.passes.paged_attention import paged_attention
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
