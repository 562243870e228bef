"""tap: it fires, it equals, it stays away."""

from __future__ import annotations

import pytest
import torch

from fxlm.compiler import pipeline
from fxlm.compiler.errors import PassError
from fxlm.compiler.program import Program
from fxlm.passes.column import COLUMN
from fxlm.passes.tap import tap
from tests.passes.options import with_options
from tests.programs import IDS, captured, run_dense


def tapped(*points: str, model_type: str = "llama") -> Program:
    return pipeline.run(captured(model_type), [with_options(tap, points=points)])


def test_a_tap_is_one_more_result() -> None:
    program = tapped("model.layers.0", "model.layers.1.mlp")
    assert program.log[-1].rewrites == 2
    assert program.taps == ["model.layers.0", "model.layers.1.mlp"]
    assert len(program.output().args[0]) == 3  # type: ignore[arg-type]


def test_it_leaves_the_logits_alone() -> None:
    torch.testing.assert_close(
        run_dense(tapped("model.layers.0"), IDS), run_dense(captured(), IDS), rtol=0, atol=0
    )


def test_taps_outlive_the_rest_of_the_column() -> None:
    names = ("paged_attention", "last_tokens", "sample")
    rest = [item for item in COLUMN if item.name in names]
    program = pipeline.run(captured(), [with_options(tap, points=("model.layers.0",))])
    program.stage = "bound"
    pipeline.run(program, rest)
    assert len(program.output().args[0]) == 5  # type: ignore[arg-type]


def test_it_stays_away_without_points() -> None:
    assert tapped().log[-1].rewrites == 0


def test_what_has_no_row_per_token_is_refused() -> None:
    program = captured()
    with pytest.raises(PassError, match=r"must begin with the tokens"):
        program.tap("w", program.placeholders("weight")[0])


def test_a_point_is_tapped_once() -> None:
    with pytest.raises(PassError, match="exists already"):
        tapped("model.layers.0", "model.layers.0")
