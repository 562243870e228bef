"""shard_experts: routers are found by their pattern; what is another stays whole."""

from __future__ import annotations

import pytest

from fxlm.compiler import ops
from fxlm.passes.layout import OWNED
from fxlm.passes.shard_experts import split_experts
from fxlm.passes.sharder import Sharder
from tests.passes.sharding import one_rank


@pytest.fixture(scope="module", autouse=True)
def _ops() -> None:
    ops.load()


def test_each_rank_gets_its_share() -> None:
    sharder = Sharder(one_rank("mixtral").copy(), ranks=2, rank=1)
    split_experts(sharder)
    assert sharder.counts["experts"] == 2
    grouped = [n for n in sharder.program.graph.nodes if "grouped_linear" in str(n.target)]
    assert {n.args[1].meta["val"].shape[0] for n in grouped} == {2}
    assert OWNED in sharder.layouts.values()


def test_a_router_of_another_kind_stays_whole() -> None:
    sharder = Sharder(one_rank("mixtral").copy(), ranks=2, rank=1)
    for node in sharder.program.graph.nodes:
        if str(node.target) == "aten.argsort.stable":
            node.args = (node.args[0].args[0], *node.args[1:])  # sorts something else
    split_experts(sharder)
    assert sharder.counts["experts"] == 0
    assert sharder.counts["experts whole"] == 2
