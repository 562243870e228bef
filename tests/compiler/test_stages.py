"""stages: snapshots that later passes do not touch, and that run."""

from __future__ import annotations

import torch

from fxlm.compiler.stages import Stage, walk
from fxlm.passes.cleanup import cleanup
from fxlm.passes.fuse_qkv import fuse_qkv
from tests.programs import IDS, captured, run_dense, weights_of


def test_a_copy_is_apart() -> None:
    program = captured()
    copy = program.copy()
    names = [n.name for n in program.graph.nodes]
    assert [n.name for n in copy.graph.nodes] == names
    fuse_qkv.run(copy)
    assert [n.name for n in program.graph.nodes] == names


def test_snapshots_come_in_order_with_their_source() -> None:
    found = list(walk(captured(), [cleanup, fuse_qkv]))
    assert [s.name for s in found] == ["captured", "cleanup", "fuse_qkv"]
    assert "def fuse_qkv(" in found[2].source
    assert found[0].report is None
    assert found[2].report is not None
    assert len(found[1].program.linears()) > len(found[2].program.linears())


def test_a_stage_runs_and_is_watched() -> None:
    program = captured()
    key = tuple(sorted(
        (program.inputs[n.name].source, tuple(int(s) for s in n.meta["val"].shape))
        for n in program.placeholders("weight")
    ))  # fmt: skip
    stage = Stage(program, weights_of(key).__getitem__)
    assert not stage.paged
    seen: list[str] = []
    given = {"input_ids": torch.tensor([IDS]), "position_ids": torch.arange(len(IDS))[None]}
    (logits,) = stage(given, {}, lambda name, value: seen.append(name))
    torch.testing.assert_close(logits, run_dense(program, IDS))
    assert program.logits().name in seen
