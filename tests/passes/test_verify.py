"""verify: counts the drafted tokens that equal what was drawn in their place."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from fxlm.compiler import pipeline
from fxlm.compiler.errors import InvalidOption, PassError
from fxlm.compiler.program import Program
from fxlm.passes.cleanup import cleanup
from fxlm.passes.last_tokens import last_tokens
from fxlm.passes.paged_attention import paged_attention
from fxlm.passes.sample import sample
from fxlm.passes.verify import verify
from tests.programs import captured

COLUMN = [cleanup, paged_attention, last_tokens, sample]


def verified(model_type: str = "llama") -> Program:
    return pipeline.run(captured(model_type), [*COLUMN, verify])


def accepted(program: Program, drawn: list[int], drafts: list[int], starts: list[int]) -> list[int]:
    """Run what the pass added on given draws."""
    values = {
        "draft_ids": torch.tensor(drafts),
        "draw_start": torch.tensor(starts),
    }
    ids = program.output().args[0][0]  # type: ignore[index]
    known: dict[torch.fx.Node, Any] = {ids: torch.tensor(drawn)}
    for name, value in values.items():
        known[program.find_step_input(name)] = value
    for node in program.graph.nodes:
        if node not in known and node.all_input_nodes and set(node.all_input_nodes) <= set(known):
            args = torch.fx.map_arg(node.args, lambda n: known[n])
            known[node] = node.target(*args, **node.kwargs) if callable(node.target) else args[0]
    found: list[int] = known[program.output().args[0][4]].tolist()  # type: ignore[index]
    return found


def naive(drawn: list[int], drafts: list[int], starts: list[int]) -> list[int]:
    counts = []
    for start in starts:
        row = start
        while drawn[row] == drafts[row]:
            row += 1
        counts.append(row - start + 1)
    return counts


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2"])
def test_any_model_becomes_its_own_verifier(model_type: str) -> None:
    program = verified(model_type)
    report = program.log[-1]
    assert (report.rewrites, report.stage) == (1, "verified")
    returned = program.output().args[0]
    assert [tuple(n.meta["val"].shape)[1:] for n in returned] == [(), (21,), (21,), (), ()]  # type: ignore[union-attr]
    assert returned[4].meta["val"].dtype == torch.int64  # type: ignore[index, union-attr]


def test_counts_equal_the_definition() -> None:
    program = verified()
    rng = random.Random(0)
    for _ in range(200):
        drawn: list[int] = []
        drafts: list[int] = []
        starts: list[int] = []
        for _ in range(rng.randint(1, 5)):
            scores = rng.choice([0, 0, 2])  # rows that score a prompt belong to no group
            drawn += [7] * scores
            drafts += [-1] * scores
            starts.append(len(drawn))
            for _ in range(rng.randint(0, 4)):
                drawn.append(rng.randrange(2))
                drafts.append(rng.randrange(2))
            drawn.append(rng.randrange(2))
            drafts.append(-1)
        assert accepted(program, drawn, drafts, starts) == naive(drawn, drafts, starts)


def test_needs_draws_in_the_graph() -> None:
    with pytest.raises(InvalidOption, match="requires the pass 'sample'"):
        pipeline.order([verify])
    with pytest.raises(PassError, match="verify"):
        pipeline.run(captured(), [cleanup, paged_attention, last_tokens, verify])
