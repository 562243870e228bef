"""fixtures: every mode gives each token its row, from the right cache slots."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxlm.models.bundled import BUNDLED
from fxlm.models.checkpoint import Checkpoint, open_checkpoint
from fxlm.models.tiny import write_checkpoint
from fxlm.runtime.explain import fixtures
from fxlm.runtime.explain.fixtures import MODES, Mode

PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]


@pytest.mark.parametrize("mode", MODES)
def test_each_token_goes_through_once(mode: Mode) -> None:
    rows = [row for _, chunks in fixtures.steps(PROMPTS, mode) for row in fixtures.rows_of(chunks)]
    assert sorted(rows) == [(i, at) for i, p in enumerate(PROMPTS) for at in range(len(p))]


def test_decode_steps_hold_one_token_a_prompt() -> None:
    steps = [chunks for _, chunks in fixtures.steps(PROMPTS, "decode batched")]
    assert [[c.count for c in chunks] for chunks in steps] == [[2], [1, 1, 1], [1, 1], [1, 1], [1]]


def test_alone_means_a_cache_of_its_own() -> None:
    assert {number for number, _ in fixtures.steps(PROMPTS, "prefill alone")} == {0, 1, 2}


def test_slots_of_prompts_do_not_meet() -> None:
    chunks = next(iter(fixtures.steps(PROMPTS, "prefill batched")))[1]
    given = fixtures.step_inputs(PROMPTS, chunks, 4)
    slots = given["slot_mapping"]
    assert len(set(slots.tolist())) == 10
    assert int(slots.min()) >= 4  # block 0 is padding
    assert given["block_table"].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert given["sample_ints"][:, 4].tolist() == [6, 7, 8, 9, 10, -1, -1, 13, 14, -1]


def test_texts_come_from_the_checkpoints_tokenizer() -> None:
    checkpoint = open_checkpoint(BUNDLED["bundled-draft"])
    prompts = fixtures.fixture_prompts(checkpoint, 10**6, 64)
    assert len(prompts) == len(fixtures.TEXTS) + len(fixtures.LENGTHS)
    assert all(0 < len(p) <= 64 for p in prompts)


def test_a_large_checkpoint_runs_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(BUNDLED["bundled-draft"])
    whole = fixtures.fixture_prompts(checkpoint, 10**6, 64)
    monkeypatch.setattr(Checkpoint, "num_bytes", fixtures.LARGE + 1)
    few = fixtures.fixture_prompts(checkpoint, 10**6, 64)
    assert few[0] == whole[1]
    assert [len(p) for p in few[1:]] == [1, 32]  # at most half of the context


def test_a_model_without_a_longest_context_runs_whole_prompts(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_checkpoint("bloom", tmp_path / "model")))
    prompts = fixtures.fixture_prompts(checkpoint, vocab_size=128, context=0)
    assert [len(ids) for ids in prompts] == list(fixtures.LENGTHS)
