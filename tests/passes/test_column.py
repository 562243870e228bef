"""The default column: its order, and that passes fail loudly."""

from __future__ import annotations

import pytest
import torch
from fxlm.compiler import pipeline
from fxlm.compiler.errors import InvalidOption, PassError
from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program
from fxlm.passes.cleanup import cleanup
from fxlm.passes.column import default_column
from fxlm.passes.last_tokens import last_tokens
from fxlm.passes.paged_attention import paged_attention
from fxlm.passes.sample import sample

from tests.programs import captured


@graph_pass(after="fuse_qkv")
def nothing(program: Program) -> int:
    """Changes nothing."""
    return 0


def names(passes: list[pipeline.GraphPass]) -> list[str]:
    return [p.name for p in passes]


def test_user_pass_goes_behind_the_one_it_names() -> None:
    placed = names(pipeline.order(default_column(), [nothing]))
    assert placed[placed.index("fuse_qkv") + 1] == "nothing"


def test_unknown_name_suggests_the_nearest() -> None:
    wrong = graph_pass(after="fuse_qvk")(lambda program: 0)
    with pytest.raises(InvalidOption, match="did you mean 'fuse_qkv'"):
        pipeline.order(default_column(), [wrong])


def test_conflicting_order_is_refused() -> None:
    @graph_pass(after="sample", before="cleanup")
    def impossible(program: Program) -> int:
        return 0

    with pytest.raises(InvalidOption, match="must run before"):
        pipeline.order(default_column(), [impossible])


def test_a_needed_pass_cannot_be_disabled() -> None:
    with pytest.raises(InvalidOption, match="requires the pass 'last_tokens'"):
        pipeline.disable(default_column(), ["last_tokens"])


def test_disabling_an_unknown_pass_is_refused() -> None:
    with pytest.raises(InvalidOption, match="did you mean 'cleanup'"):
        pipeline.disable(default_column(), ["clean_up"])


def test_a_pass_that_fires_too_seldom_is_an_error() -> None:
    @graph_pass(expects=2)
    def shy(program: Program) -> int:
        program.miss(program.attentions()[0], "it looked wrong")
        return 1

    with pytest.raises(PassError, match=r"1 places, but 2 .*it looked wrong"):
        pipeline.run(captured(), [shy])


def test_a_pass_that_breaks_the_graph_is_named() -> None:
    @graph_pass
    def careless(program: Program) -> int:
        with program.graph.inserting_before(program.output()):
            node = program.graph.call_function(torch.ops.aten.neg.default, *program.output().args)
        program.output().args = ((node,),)
        return 1

    with pytest.raises(PassError, match="careless left an unlawful graph.*no metadata"):
        pipeline.run(captured(), [careless])


def test_a_pass_that_returns_no_count_is_refused() -> None:
    with pytest.raises(PassError, match="must return a count"):
        pipeline.run(captured(), [graph_pass(lambda program: None)])


def test_cleanup_removes_casts_to_the_same_type() -> None:
    program = pipeline.run(captured(), [cleanup])
    assert program.log[-1].removed["aten.to.dtype"] == program.log[-1].rewrites - 2
    left = program.find(torch.ops.aten.to.dtype)
    assert [n.args[0].meta["val"].dtype for n in left] == [torch.int64]  # positions to float


def test_cleanup_leaves_a_cast_that_changes_the_type() -> None:
    program = captured()
    node = program.linears()[0]
    with program.graph.inserting_before(node.next):
        cast = program.call(torch.ops.aten.to.dtype, node, torch.float64, like=node)
        back = program.call(torch.ops.aten.to.dtype, cast, torch.float32, like=node)
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not cast)
    pipeline.run(program, [cleanup])
    assert cast in program.graph.nodes
    assert back in program.graph.nodes


def test_paging_replaces_every_attention_and_adds_two_caches_a_layer() -> None:
    program = pipeline.run(captured(), [cleanup, paged_attention])
    assert program.stage == "paged"
    assert len(program.placeholders("cache")) == 4
    assert not program.find(torch.ops.fxlm.attention.default)
    spec = program.caches[0]
    assert (spec.num_kv_heads, spec.key_dim, spec.value_dim) == (2, 16, 16)
    assert spec.bytes_per_token == 2 * 32 * 4


def test_last_tokens_stand_before_the_head() -> None:
    program = pipeline.run(captured(), [cleanup, paged_attention, last_tokens])
    (rows,) = program.find(torch.ops.aten.index_select.default)
    (user,) = rows.users
    assert user.target is torch.ops.aten.linear.default
    assert user.meta["val"].shape[-1] == 256


def test_last_tokens_reach_through_soft_capping() -> None:
    program = pipeline.run(captured("gemma2"), [cleanup, paged_attention, last_tokens])
    (rows,) = program.find(torch.ops.aten.index_select.default)
    assert next(iter(rows.users)).target is torch.ops.aten.linear.default


def test_sampling_returns_four_values_and_no_logits() -> None:
    program = pipeline.run(captured(), [cleanup, paged_attention, last_tokens, sample])
    shapes = [tuple(n.meta["val"].shape)[1:] for n in program.output().args[0]]
    assert shapes == [(), (21,), (21,), ()]
