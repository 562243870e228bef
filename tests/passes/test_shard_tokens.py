"""shard_tokens: sums split over the tokens; it fires, it equals one rank's, it stays away."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxlm.compiler import ops
from fxlm.compiler.ops.collectives import sent_per_step
from fxlm.compiler.program import Program
from fxlm.compiler.report import op_counts
from fxlm.passes import shard_tokens
from fxlm.passes.layout import PARTIAL, WHOLE, Layout, is_token_wise, split, tokens
from fxlm.passes.sharder import Sharder
from tests.passes.sharding import one_rank, rank_of, ranked, run_part
from tests.programs import IDS, run_dense
from tests.ranks import run_ranks

aten = torch.ops.aten


@pytest.fixture(scope="module", autouse=True)
def _ops() -> None:
    ops.load()


def counts(program: Program) -> tuple[int, int, int]:
    """Reduce-scatters, gathers and all-reduces."""
    found = op_counts(program.graph)
    names = ("reduce_scatter", "all_gather", "all_reduce")
    scatters, gathers, sums = (found[f"fxlm.{name}.default"] for name in names)
    return scatters, gathers, sums


# family -> reduce-scatters, gathers (one is that of the logits), all-reduces; two layers.
FAMILIES = {
    "llama": (5, 5 + 1, 0),
    "qwen3": (5, 5 + 1, 0),  # norms of q and k, by heads
    "gemma2": (5, 5 + 1, 0),  # norms behind the sums too
    "mixtral": (5, 5 + 1, 0),  # the router takes whole tokens
    "gpt_neox": (3, 5 + 1, 0),  # two norms of one sum, and a linear behind each
    "cohere": (5, 3 + 1, 0),  # one norm for two sums
    "olmo2": (5, 5 + 1, 4),  # squares of norms over all heads stay all-reduced
}


@pytest.mark.parametrize("family", FAMILIES)
def test_fires(family: str) -> None:
    assert counts(rank_of(family, 2, 0, sequence_parallel=True)) == FAMILIES[family]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_one_rank(family: str, ranks: int) -> None:
    whole = one_rank(family)
    programs = ranked(family, ranks, sequence_parallel=True)
    for ids in (IDS, IDS[:1], IDS[:3]):  # 7, 1 and 3 tokens: none divide
        expected = run_dense(whole, ids)
        for logits in run_ranks(ranks, lambda rank, ids=ids: run_part(programs[rank], whole, ids)):
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_the_residual_stays_split_between_layers() -> None:
    program = rank_of("llama", 2, 0, sequence_parallel=True)
    share = (program.symbol("T") + 1) // 2
    streams = [
        node for node in program.graph.nodes
        if node.target is aten.add.Tensor and tuple(node.meta["val"].shape) == (1, share, 64)
    ]  # fmt: skip
    assert len(streams) == 4  # two additions a layer


def test_stays_away_unless_asked() -> None:
    assert counts(rank_of("llama", 2, 0)) == (0, 1, 5)


def test_reports_what_it_decided() -> None:
    program = rank_of("llama", 2, 0, sequence_parallel=True)
    # A ring of two sends half: of 64 floats in 5 scatters and 5 gathers, and of 256 logits.
    sent = (10 * 64 + 256) * 4 // 2
    line = ("sequence parallel: 5 sums split over the tokens, gathered 5 times; 0 sums whole; "
            f"{sent} bytes sent by a rank for a token with logits")  # fmt: skip
    assert line in program.log[-1].notes
    assert sent_per_step(program, 2)["count"] == 11


# op, arguments ("x" is the value [1, T, 64] in question, "y" another, whole one), layouts.
CASES: list[tuple[Any, list[Any], Layout, Layout | None]] = [
    (aten.silu.default, ["x"], PARTIAL, tokens(1, 2)),
    (aten.neg.default, ["x"], PARTIAL, PARTIAL),
    (aten.silu.default, ["x"], tokens(1, 2), tokens(1, 2)),
    (aten.mean.dim, ["x", [-1], True], tokens(1, 2), tokens(1, 2)),
    (aten.mean.dim, ["x", [1]], tokens(1, 2), None),
    (aten.cumsum.default, ["x", 1], tokens(1, 2), None),
    (aten.softmax.int, ["x", 1], tokens(1, 2), None),
    (aten.rms_norm.default, ["x", [64]], tokens(1, 2), tokens(1, 2)),
    (aten.add.Tensor, ["x", "y"], tokens(1, 2), None),
    (aten.silu.default, ["x"], WHOLE, None),
    (aten.silu.default, ["x"], split(2, 2), None),
]


@pytest.mark.parametrize(("target", "args", "given", "expected"), CASES)
def test_layouts(target: Any, args: list[Any], given: Layout, expected: Layout | None) -> None:
    program = one_rank("llama").copy()
    sharder = Sharder(program, ranks=2, rank=1, over_tokens=True)
    named = {"x": program.linears("o_proj")[0], "y": program.linears("down_proj")[0]}
    with program.graph.inserting_before(program.output()):
        filled = [named[a] if isinstance(a, str) else a for a in args]
        node = program.call(target, *filled, like=named["x"])
    sharder.layouts[named["x"]] = given
    assert shard_tokens.apply(sharder, node) == expected
    if given.kind == "tokens" and expected is None:
        gathered: Any = node.args[0]
        assert gathered.target is torch.ops.fxlm.all_gather.default


def test_a_norm_over_the_tokens_is_not_token_wise() -> None:
    program = one_rank("llama").copy()
    (x, *_) = program.linears("o_proj")
    with program.graph.inserting_before(program.output()):
        node = program.call(aten.linalg_vector_norm.default, x, 2, [1], like=x)
    assert not is_token_wise(node, 1)
    assert is_token_wise(node, 0)


@pytest.mark.parametrize("length", [1, 3, 4, 7])
def test_scatter_then_gather_is_the_sum(length: int) -> None:
    given = [torch.randn(1, length, 8) for _ in range(4)]
    collectives = torch.ops.fxlm

    def both(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        share = collectives.reduce_scatter(given[rank], 1, 4, "tp")
        return share, collectives.all_gather(share, 1, 4, length, "tp")

    results = run_ranks(4, both)
    expected = torch.stack(given).sum(0)
    part = -(-length // 4)
    for share, total in results:
        assert share.shape == (1, part, 8)
        torch.testing.assert_close(total, expected)
    rows = torch.cat([share for share, _ in results], 1)
    assert not rows[:, length:].any()  # what is no token is zero
