"""Programs of ranks: copies of one captured program, and how to run one on parts of its weights."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from fxlm.compiler import pipeline
from fxlm.compiler.program import Program
from fxlm.passes.cleanup import cleanup
from fxlm.passes.shard import shard
from tests.programs import captured, weights_of


@cache
def one_rank(family: str, **overrides: Any) -> Program:
    """The program before `shard`; do not change it."""
    return pipeline.run(captured(family, **overrides), [cleanup])


def ranked(
    family: str, ranks: int, sequence_parallel: bool = False, **overrides: Any
) -> list[Program]:
    """The program of each rank."""
    return [rank_of(family, ranks, rank, sequence_parallel, **overrides) for rank in range(ranks)]


def rank_of(
    family: str, ranks: int, rank: int, sequence_parallel: bool = False, **overrides: Any
) -> Program:
    """The program of one rank."""
    chosen = {"ranks": ranks, "rank": rank, "sequence_parallel": sequence_parallel}
    item = replace(shard, options=chosen)
    return pipeline.run(one_rank(family, **overrides).copy(), [item])


def run_part(program: Program, whole: Program, ids: list[int]) -> torch.Tensor:
    """Interpret a rank's program; its inputs are those of ``whole``, cut as they say."""
    sizes: Any = {
        whole.inputs[n.name].source: tuple(int(s) for s in n.meta["val"].shape)
        for n in whole.placeholders("weight")
    }
    values = weights_of(tuple(sorted(sizes.items())))
    args = []
    for node in program.placeholders():
        spec = program.inputs[node.name]
        if spec.role == "weight":
            value = values[spec.source]
            part = spec.part
            args.append(value.narrow(part.dim, part.start, part.length) if part else value)
        elif spec.role == "constant":
            args.append(program.constants[spec.source])
        else:
            given = {"input_ids": torch.tensor([ids]), "position_ids": torch.arange(len(ids))[None]}
            args.append(given[spec.source])
    (logits,) = torch.fx.Interpreter(program.module).run(*args)
    return torch.as_tensor(logits)
