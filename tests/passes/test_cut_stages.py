"""cut_stages: every stage has its layers, and one after another they are the whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from fxlm.compiler import pipeline
from fxlm.compiler.errors import PassError
from fxlm.compiler.program import Program, received
from fxlm.compiler.stages import Stage
from fxlm.passes.cleanup import cleanup
from fxlm.passes.cut_stages import balanced, cut_stages
from fxlm.passes.last_tokens import last_tokens
from fxlm.passes.paged_attention import paged_attention
from fxlm.passes.sample import sample
from tests.programs import IDS, captured, weights_of

LAYERS = 4


@cache
def whole(family: str, layers: int = LAYERS) -> Program:
    """Do not change it."""
    column = [cleanup, paged_attention, last_tokens, sample]
    return pipeline.run(captured(family, num_hidden_layers=layers), column)


def piece(family: str, stages: int, stage: int, layers: int = LAYERS) -> Program:
    item = replace(cut_stages, options={"stages": stages, "stage": stage})
    return pipeline.run(whole(family, layers).copy(), [item])


def step_inputs() -> dict[str, torch.Tensor]:
    """All of `IDS` as one prompt, in the blocks 1 and on."""
    count = len(IDS)
    return {
        "input_ids": torch.tensor([IDS]), "position_ids": torch.arange(count)[None],
        "slot_mapping": torch.arange(count) + 16,
        "query_start": torch.tensor([0, count], dtype=torch.int32),
        "seq_lens": torch.tensor([count], dtype=torch.int32),
        "block_table": torch.tensor([[1]], dtype=torch.int32),
        "logits_indices": torch.tensor([count - 1]),
        "sample_floats": torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 0.0]]),
        "sample_ints": torch.tensor([[0, 0, 1, 20, -1]]),
        "adjust_start": torch.zeros(2, dtype=torch.int32),
        "adjust_ids": torch.zeros(1, dtype=torch.int64),
        "adjust_counts": torch.zeros(1, dtype=torch.int32), "adjust_bias": torch.zeros(1),
    }  # fmt: skip


def run(family: str, programs: Sequence[Program]) -> list[torch.Tensor]:
    """One program after another on values that are handed on."""
    sizes: Any = {
        whole(family).inputs[n.name].source: tuple(int(s) for s in n.meta["val"].shape)
        for n in whole(family).placeholders("weight")
    }
    values = weights_of(tuple(sorted(sizes.items())))
    handed: list[torch.Tensor] = []
    for program in programs:
        inputs = step_inputs()
        inputs |= dict(zip((name for name, _, _ in received(program)), handed, strict=True))
        caches = {
            (kind, layer): torch.zeros(3, spec.num_kv_heads, 16, dim)
            for layer, spec in enumerate(program.caches)
            for kind, dim in (("k", spec.key_dim), ("v", spec.value_dim))
        }
        handed = Stage(program, values.__getitem__)(inputs, caches)
    return handed


def test_each_stage_has_its_layers_caches_and_weights() -> None:
    parts = [piece("llama", 2, stage) for stage in range(2)]
    assert [p.log[-1].rewrites for p in parts] == [2, 2]
    assert [len(p.caches) for p in parts] == [2, 2]
    assert [n for n, _, _ in received(parts[0])] == []
    assert received(parts[1]) == [("received.0", "float32", [[1, 0], [1, 1], [64, 0]])]
    used = [{p.inputs[n.name].source for n in p.placeholders("weight")} for p in parts]
    assert not used[0] & used[1], "the embedding is not tied here"
    assert len(parts[0].results()) == 1
    assert len(parts[1].results()) == 4
    assert not parts[0].find(torch.ops.fxlm.sample.default)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt2", "qwen3"])
@pytest.mark.parametrize("stages", [2, 3])
def test_stages_in_a_row_equal_the_whole(family: str, stages: int) -> None:
    expected = run(family, [whole(family)])
    found = run(family, [piece(family, stages, stage) for stage in range(stages)])
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_rotary_tables_are_not_handed_on() -> None:
    assert "cos" in str(piece("llama", 2, 1).graph)
    assert len(received(piece("llama", 2, 1))) == 1


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(PassError, match="4 layers cannot be cut into 5 stages"):
        piece("llama", 5, 0)


def carried(make: Callable[[Program, torch.fx.Node], torch.fx.Node]) -> Program:
    """The whole program, in which the first layer makes a value that the last one takes."""
    program = whole("llama").copy()
    early, late = program.attentions()[0], program.attentions()[-1]
    with program.graph.inserting_after(early):
        value = make(program, early)
    with program.graph.inserting_after(late):
        total = program.call(torch.ops.aten.sum.default, value, like=late)
    with program.graph.inserting_after(total):
        moved = program.call(torch.ops.aten.add.Tensor, late, total, like=late)
    late.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
    return program


def test_other_values_are_handed_on_too() -> None:
    program = carried(lambda p, n: p.call(torch.ops.aten.mul.Scalar, n, 2.0, like=n))
    item = replace(cut_stages, options={"stages": 3, "stage": 1})
    middle = pipeline.run(program, [item])
    assert len(received(middle)) == len(middle.results()) == 2


def test_a_value_of_another_size_is_refused() -> None:
    program = carried(lambda p, n: p.call(torch.ops.aten.cat.default, [n, n], 1, like=n))
    item = replace(cut_stages, options={"stages": 2, "stage": 0})
    with pytest.raises(PassError, match="cannot be handed on"):
        pipeline.run(program, [item])


@pytest.mark.parametrize(
    ("costs", "parts", "expected"),
    [
        ([1, 1, 1, 1], 2, [(0, 2), (2, 4)]),
        ([1, 1, 1, 5], 2, [(0, 3), (3, 4)]),
        ([4, 1, 1, 1, 1], 2, [(0, 1), (1, 5)]),
        ([0, 0, 0], 3, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_the_dearest_run_is_as_cheap_as_can_be(
    costs: list[int], parts: int, expected: list[tuple[int, int]]
) -> None:
    assert balanced(costs, parts) == expected
