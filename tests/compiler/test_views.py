"""views: a layer before and after a pass, and what changed."""

from __future__ import annotations

from itertools import pairwise

from fxlm.compiler.pipeline import GraphPass
from fxlm.compiler.stages import walk
from fxlm.compiler.views import OUTSIDE, Picture, compared
from fxlm.passes.cleanup import cleanup
from fxlm.passes.fuse_qkv import fuse_qkv
from fxlm.passes.last_tokens import last_tokens
from tests.programs import captured


def pictures(*passes: GraphPass) -> list[Picture]:
    snapshots = list(walk(captured(), passes))
    return [compared(a.program, b.program) for a, b in pairwise(snapshots)]


def labels(picture: Picture, mark: str) -> list[str]:
    return sorted(picture.views[n].label for n, m in picture.marks.items() if m == mark)


def test_a_fusion_shows_in_the_first_layer() -> None:
    picture = pictures(cleanup, fuse_qkv)[1]
    assert picture.layer == 0
    assert labels(picture, "removed") == ["linear"] * 3
    assert labels(picture, "added") == ["cat", "linear", "slice", "slice", "slice"]
    assert labels(picture, "changed") == ["view"] * 3


def test_the_diff_is_readable() -> None:
    diff = pictures(cleanup, fuse_qkv)[1].diff
    assert any(line.startswith("-linear = linear(mul") for line in diff), diff
    assert any("<self_attn.q_proj.weight>" in line and line[0] == "+" for line in diff)
    assert not any("sym_size" in line for line in diff)
    assert any("[1, T, " in line for line in diff)


def test_a_change_outside_of_the_layers_shows_its_neighbours() -> None:
    picture = pictures(cleanup, last_tokens)[1]
    assert picture.layer == OUTSIDE
    assert labels(picture, "added") == ["index_select", "logits_indices"]
    assert len(picture.views) < 20


def test_a_pass_that_does_nothing_changes_nothing() -> None:
    assert pictures(cleanup, GraphPass(name="idle", run=lambda program: 0))[1].num_changed == 0
