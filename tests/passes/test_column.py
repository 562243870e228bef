"""The default column: its order, and that passes fail loudly."""

from __future__ import annotations

import pytest
import torch

from fxlm.compiler import pipeline
from fxlm.compiler.errors import InvalidOption, PassError
from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program
from fxlm.passes.column import default_column
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


def user_pass(name: str, **place: str) -> pipeline.GraphPass:
    return graph_pass(name=name, **place)(lambda program: 0)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"after": "two"}, {"after": "fuse_qkv"}),
        ({"before": "two"}, {"after": "one"}),
        ({"requires": "two"}, {"before": "sample"}),
    ],
)
def test_user_passes_name_each_other_in_any_order(
    one: dict[str, str], other: dict[str, str], backwards: bool
) -> None:
    given = [user_pass("one", **one), user_pass("two", **other)]
    placed = names(pipeline.order(default_column(), given[::-1] if backwards else given))
    earlier, later = ("one", "two") if "before" in one else ("two", "one")
    assert placed.index(earlier) < placed.index(later)


def test_a_circle_of_user_passes_is_refused() -> None:
    given = [user_pass("one", after="two"), user_pass("two", after="one")]
    with pytest.raises(InvalidOption, match="must run after") as refused:
        pipeline.order(default_column(), given)
    both = "'one' declares after 'two' (place 15), 'two' declares after 'one' (place 14)"
    assert both in str(refused.value)


@pytest.mark.parametrize("name", ["twice", "fuse_qkv"])
def test_a_name_is_used_once(name: str) -> None:
    with pytest.raises(InvalidOption, match="already in the column"):
        pipeline.order(default_column(), [user_pass(name), user_pass(name)])


def test_unknown_name_suggests_the_nearest() -> None:
    wrong = graph_pass(after="fuse_qvk")(lambda program: 0)
    with pytest.raises(InvalidOption, match="did you mean 'fuse_qkv'"):
        pipeline.order(default_column(), [wrong])


def test_conflicting_order_is_refused() -> None:
    @graph_pass(after="sample", before="cleanup")
    def impossible(program: Program) -> int:
        return 0

    with pytest.raises(InvalidOption) as refused:
        pipeline.order(default_column(), [impossible])
    assert str(refused.value) == (
        "pass='impossible' cannot be used: it must run before 'cleanup' (place 2 of 18), but is at "
        "place 12; 'impossible' declares after 'sample' (place 11), before 'cleanup' (place 2), "
        "'cleanup' declares no order: change what one of these declares"
    )


def test_a_pass_cannot_follow_itself() -> None:
    with pytest.raises(InvalidOption, match="pass='circle' cannot be used: it cannot be before"):
        pipeline.order(default_column(), [user_pass("circle", after="circle")])


def test_a_needed_pass_cannot_be_disabled() -> None:
    needed = "'sample' requires the pass 'last_tokens', which is not in the column: keep 'last"
    with pytest.raises(InvalidOption, match=needed):
        pipeline.disable(default_column(), ["last_tokens"])


def test_disabling_an_unknown_pass_is_refused() -> None:
    for name in ("clean_up", "CLEANUP"):
        with pytest.raises(InvalidOption, match="did you mean 'cleanup'"):
            pipeline.disable(default_column(), [name])


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

    with pytest.raises(PassError, match=r"careless left an unlawful graph.*no metadata"):
        pipeline.run(captured(), [careless])


@pytest.mark.parametrize("count", [None, True, -1, 1.0])
def test_a_pass_that_returns_no_count_is_refused(count: object) -> None:
    with pytest.raises(PassError, match="must return how many"):
        pipeline.run(captured(), [graph_pass(lambda program: count)])  # type: ignore[arg-type,return-value]


def test_a_count_without_a_change_is_refused() -> None:
    @graph_pass
    def boastful(program: Program) -> int:
        node = program.linears("down_proj")[0]
        with program.graph.inserting_before(node.next):
            program.call(torch.ops.aten.neg.default, node, like=node)  # nobody uses it
        return 1

    with pytest.raises(PassError, match="boastful returned 1, but the program is as it was"):
        pipeline.run(captured(), [boastful])


def test_a_change_without_a_count_is_refused() -> None:
    @graph_pass
    def silent(program: Program) -> int:
        node = program.find(torch.ops.aten.silu.default)[0]
        node.target = torch.ops.aten.relu.default
        return 0

    with pytest.raises(PassError, match="silent returned 0, but changed the program"):
        pipeline.run(captured(), [silent])


def test_a_pass_that_only_looks_returns_none() -> None:
    (report,) = pipeline.run(captured(), [nothing]).log
    assert (report.rewrites, report.added, report.removed) == (0, {}, {})


def test_the_program_is_compared_once_between_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Program] = []
    whole = pipeline._state
    monkeypatch.setattr(pipeline, "_state", lambda program: (seen.append(program), whole(program)))
    pipeline.run(captured(), [nothing, graph_pass(name="other")(lambda program: 0)])
    assert len(seen) == 3


def test_a_pass_that_exits_is_named() -> None:
    @graph_pass
    def leaving(program: Program) -> int:
        raise SystemExit(3)

    with pytest.raises(PassError, match="pass leaving failed: SystemExit: 3"):
        pipeline.run(captured(), [leaving])


def test_a_pass_that_breaks_shapes_is_named_itself() -> None:
    @graph_pass
    def wide(program: Program) -> int:
        node = program.linears("down_proj")[0]
        with program.graph.inserting_before(node.next):
            both = program.call(torch.ops.aten.cat.default, [node, node], -1, like=node)
        node.replace_all_uses_with(both, delete_user_cb=lambda user: user is not both)
        return 1

    with pytest.raises(PassError, match="pass wide left an unlawful graph"):
        pipeline.run(captured(), [wide])


def test_a_pass_that_raises_says_where() -> None:
    @graph_pass
    def broken(program: Program) -> int:
        raise ValueError("my bug")

    with pytest.raises(PassError, match=r"ValueError: my bug \(.*test_column\.py:\d+\)"):
        pipeline.run(captured(), [broken])
