"""capture: one ragged token dimension, real constants, and no device but the one asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxlm.compiler import pipeline
from fxlm.compiler.capture import capture
from fxlm.compiler.errors import UnsupportedModel
from fxlm.compiler.hoist import hoist
from tests.passes.options import plain_column
from tests.programs import IDS, captured, facts, run_dense, tiny_model


@pytest.mark.parametrize("length", [1, 2, 7, 300])
def test_any_number_of_tokens(length: int) -> None:
    ids = (IDS * 50)[:length]
    assert run_dense(captured(), ids).shape == (1, length, 256)


def test_constants_have_the_values_that_the_config_implies() -> None:
    program = captured("llama", rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    (frequencies,) = program.constants.values()
    torch.testing.assert_close(frequencies, 100.0 ** (-torch.arange(0, 16, 2) / 16))


def test_tied_weights_are_one_input() -> None:
    sources = [captured(tie_word_embeddings=tied).placeholders("weight") for tied in (True, False)]
    assert len(sources[0]) == len(sources[1]) - 1


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "mixtral", "opt", "phi3"])
def test_nothing_assumes_the_cpu(model_type: str) -> None:
    # No build for another device is at hand; the meta device stands for it: an op that mixed
    # it with the CPU would fail while tracing.
    program = capture(tiny_model(model_type), facts(model_type, device="meta"))
    cut = hoist(pipeline.run(program, plain_column()))
    for node in [*cut.step.nodes, *cut.load.nodes]:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            assert value.device.type == "meta", node.format_node()


def test_a_model_that_does_not_trace_is_named() -> None:
    class Stubborn(nn.Module):
        def forward(self, input_ids: torch.Tensor, **kwargs: object) -> None:
            if input_ids.sum() > 3:
                raise AssertionError

    with pytest.raises(UnsupportedModel, match="the model does not capture"):
        capture(Stubborn(), facts())
