"""outline: equal layers are one region, and regions exchange tensors only."""

from __future__ import annotations

import pytest
import torch

from fxlm.compiler import pipeline
from fxlm.compiler.hoist import hoist
from fxlm.compiler.outline import Outline, outline
from fxlm.passes.cleanup import cleanup
from fxlm.passes.last_tokens import last_tokens
from fxlm.passes.paged_attention import paged_attention
from fxlm.passes.sample import sample
from tests.programs import captured


def outlined(model_type: str, cut: bool | None = True, **overrides: object) -> Outline:
    program = pipeline.run(captured(model_type, **overrides), [cleanup, paged_attention,
                                                               last_tokens, sample])  # fmt: skip
    return outline(hoist(program).step, cut)


def test_equal_layers_are_compiled_once() -> None:
    plan = outlined("llama", num_hidden_layers=4)
    assert [r.name for r in plan.regions] == ["prologue", "layer", "epilogue"]
    assert [c.region for c in plan.calls] == ["prologue", *["layer"] * 4, "epilogue"]


def test_alternating_layers_make_two_regions() -> None:
    plan = outlined("gemma2", num_hidden_layers=4)
    assert len([r for r in plan.regions if r.name.startswith("layer")]) == 2


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_regions_take_tensors_only(model_type: str) -> None:
    for region in outlined(model_type).regions:
        values = [n.meta["val"] for n in region.graph.nodes if n.op == "placeholder"]
        assert all(isinstance(v, torch.Tensor) for v in values), region.name


def test_every_value_is_made_before_it_is_taken() -> None:
    plan = outlined("gemma2", num_hidden_layers=3)
    program_inputs = set()
    made: set[str] = set()
    for call in plan.calls:
        program_inputs |= set(call.inputs) - made
        made |= set(call.outputs)
    assert set(plan.results) <= made
    assert not program_inputs & made


def test_the_digest_does_not_depend_on_names() -> None:
    shallow = {r.name: r.digest for r in outlined("llama", num_hidden_layers=2).regions}
    deep = {r.name: r.digest for r in outlined("llama", num_hidden_layers=3).regions}
    assert shallow["layer"] == deep["layer"]


def test_the_digest_depends_on_numbers() -> None:
    a = outlined("llama").regions[1].digest
    b = outlined("llama", rms_norm_eps=1e-3).regions[1].digest
    assert a != b


def test_a_shallow_model_is_left_whole() -> None:
    plan = outlined("llama", None, num_hidden_layers=2)
    assert [r.name for r in plan.regions] == ["step"]
    assert len(plan.calls) == 1
    assert plan.calls[0].outputs == plan.results


def test_a_deep_model_is_cut() -> None:
    plan = outlined("llama", None, num_hidden_layers=12)
    assert [r.name for r in plan.regions] == ["prologue", "layer", "epilogue"]
