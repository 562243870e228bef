"""shard: it fires, it equals one rank's, it stays away, it refuses; collectives are counted."""

from __future__ import annotations

import pytest
import torch

from fxlm.compiler import ops
from fxlm.compiler.errors import PassError
from fxlm.compiler.ops.collectives import sent_bytes
from fxlm.compiler.outline import outline
from fxlm.compiler.program import Program
from fxlm.compiler.report import op_counts
from tests.passes.sharding import one_rank, rank_of, ranked, run_part
from tests.programs import IDS, run_dense
from tests.ranks import run_ranks


@pytest.fixture(scope="module", autouse=True)
def _ops() -> None:
    ops.load()


def counts(program: Program) -> dict[str, int]:
    found = op_counts(program.graph)
    return {n: found[f"fxlm.{n}.default"] for n in ("all_reduce", "all_gather")}


# family -> all-reduces for two layers; the embedding needs one of them.
FAMILIES = {
    "llama": 5,
    "qwen3": 5,  # norms on q and k, fewer KV heads
    "gemma2": 5,  # soft caps, windows, scaled embedding, tied head
    "mixtral": 5,  # experts split
    "gpt_oss": 5,  # sinks, biases on every projection and on every expert
    "phi3": 5,  # q, k, v and gate, up in one tensor each
    "gpt_neox": 3,  # attention and MLP side by side share one sum
    "cohere": 5,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_equal_one(family: str) -> None:
    whole = one_rank(family)
    programs = ranked(family, 2)
    assert programs[0].log[-1].rewrites == 2
    assert counts(programs[0]) == {"all_reduce": FAMILIES[family], "all_gather": 1}
    expected = run_dense(whole, IDS)
    for logits in run_ranks(2, lambda rank: run_part(programs[rank], whole, IDS)):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_a_kv_head_for_two_of_four_ranks(family: str) -> None:
    whole = one_rank(family)
    programs = ranked(family, 4)
    shapes = {tuple(n.args[1].meta["val"].shape)[:2] for n in programs[3].attentions()}
    assert shapes == {(1, 1)}
    expected = run_dense(whole, IDS)
    for logits in run_ranks(4, lambda rank: run_part(programs[rank], whole, IDS)):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_norm_over_all_heads_sums_its_squares_over_the_ranks() -> None:
    whole = one_rank("olmo2")
    programs = ranked("olmo2", 2)
    assert counts(programs[0]) == {"all_reduce": 5 + 4, "all_gather": 1}
    expected = run_dense(whole, IDS)
    for logits in run_ranks(2, lambda rank: run_part(programs[rank], whole, IDS)):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_vocabulary_that_does_not_divide_is_padded() -> None:
    whole = one_rank("llama", vocab_size=251)
    programs = ranked("llama", 2, vocab_size=251)
    expected = run_dense(whole, IDS)
    assert expected.shape[-1] == 251
    for logits in run_ranks(2, lambda rank: run_part(programs[rank], whole, IDS)):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_every_rank_has_the_same_step() -> None:
    from fxlm.compiler.hoist import hoist

    digests = [
        [region.digest for region in outline(hoist(program).step).regions]
        for program in ranked("mixtral", 2)
    ]
    assert digests[0] == digests[1]


def test_weights_are_cut_at_the_checkpoint() -> None:
    program = rank_of("llama", 2, 1)
    shares = {
        spec.source: spec.part
        for node in program.placeholders("weight")
        for spec in [program.inputs[node.name]]
    }
    for name, part in shares.items():
        if "norm" in name:
            assert part is None
        else:
            assert part is not None
            assert part.dim == (1 if "o_proj" in name or "down_proj" in name else 0)
            assert part.start == part.length


@pytest.mark.parametrize(
    ("family", "ranks", "message"),
    [
        ("llama", 3, r"layers\.0\.self_attn cannot be cut into 3 parts: 4 query heads"),
        ("gpt_neox", 8, "4 query heads do not divide"),
    ],
)
def test_heads_that_do_not_divide_are_refused(family: str, ranks: int, message: str) -> None:
    with pytest.raises(PassError, match=message):
        rank_of(family, ranks, 0)


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("llama", {"intermediate_size": 98}, "98 output features do not divide"),
        ("mixtral", {"num_local_experts": 6}, "6 experts do not divide"),
        ("llama", {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 192},
         "3 KV heads neither divide"),
    ],
)  # fmt: skip
def test_widths_that_do_not_divide_are_refused(
    family: str, overrides: dict[str, int], message: str
) -> None:
    with pytest.raises(PassError, match=message):
        rank_of(family, 4, 0, **overrides)


def test_stays_away_from_what_no_split_reaches() -> None:
    program = rank_of("llama", 2, 0)
    norms = [n for n in program.placeholders("weight") if "norm" in program.inputs[n.name].source]
    assert norms
    assert all(tuple(n.meta["val"].shape) == (64,) for n in norms)


def test_reports_what_it_decided() -> None:
    notes = rank_of("mixtral", 2, 1).log[-1].notes
    assert notes[0] == "rank 1 of 2: query heads a layer 2 (2x), KV heads 1 (2x)"
    assert "experts split in 2 layers, 2 a rank" in notes
    assert "collectives: 1 all_gather, 5 all_reduce" in notes


def test_bytes_sent_are_those_of_a_ring() -> None:
    program = rank_of("llama", 4, 0)
    tokens = program.symbol("T").node.expr
    # 5 sums of 64 floats, and the gather of 256, for one token; a ring of 4 sends 3/4 (twice).
    assert sent_bytes(program.graph, 4, {tokens: 1}) == 5 * 2 * 64 * 4 * 3 // 4 + 256 * 4 * 3 // 4
