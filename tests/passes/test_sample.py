"""sample: ids leave the graph, logits do not."""

from __future__ import annotations

import pytest

from fxlm.compiler import pipeline
from fxlm.compiler.errors import InvalidOption
from fxlm.passes.cleanup import cleanup
from fxlm.passes.last_tokens import last_tokens
from fxlm.passes.paged_attention import paged_attention
from fxlm.passes.sample import sample
from tests.programs import captured


def test_sampling_returns_four_values_and_no_logits() -> None:
    program = pipeline.run(captured(), [cleanup, paged_attention, last_tokens, sample])
    shapes = [tuple(n.meta["val"].shape)[1:] for n in program.output().args[0]]
    assert shapes == [(), (21,), (21,), ()]


def test_needs_the_rows_first() -> None:
    with pytest.raises(InvalidOption, match="requires the pass 'last_tokens'"):
        pipeline.order([sample])
