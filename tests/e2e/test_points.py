"""Taps and steering, per request in a batch: what comes back, and that nobody else notices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fxlm import LLM, SamplingParams
from fxlm.compiler.errors import InvalidRequest
from tests.checkpoints import make_checkpoint

FIRST, SECOND = "model.layers.0", "model.layers.1"
PROMPT = [3, 17, 99, 4, 5, 200, 17, 8, 9, 11] * 4
HIDDEN = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("points"))


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    """Small steps, so that prompts are cut into chunks."""
    return LLM(
        str(checkpoint), enforce_eager=True, dtype="float32", max_num_seqs=4, tap=[FIRST, SECOND],
        steer=[FIRST], max_num_batched_tokens=12, skip_tokenizer_init=True,
    )  # fmt: skip


def run(llm: LLM, *params: dict[str, Any]) -> list[Any]:
    base = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True, "detokenize": False}
    made = llm.generate(
        [{"prompt_token_ids": PROMPT}] * len(params), [SamplingParams(**base, **p) for p in params]
    )
    return [output.outputs[0] for output in made]


def hidden_states(checkpoint: Path, ids: list[int]) -> tuple[torch.Tensor, ...]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    assert states is not None
    return tuple(state[0] for state in states)


def test_taps_are_the_hidden_states_of_transformers(llm: LLM, checkpoint: Path) -> None:
    (found,) = run(llm, {"taps": [FIRST], "tap_prompt": True})
    states = hidden_states(checkpoint, PROMPT + found.token_ids[:-1])
    rows = torch.from_numpy(found.taps[FIRST])
    assert list(rows.shape) == [len(PROMPT) + 5, HIDDEN]
    torch.testing.assert_close(rows, states[1], rtol=1e-4, atol=1e-4)


def test_a_row_a_token_without_the_prompt_cached_or_not(llm: LLM) -> None:
    (whole,) = run(llm, {"taps": [FIRST], "tap_prompt": True})
    for _ in range(2):  # the second finds the prompt in the prefix cache
        (found,) = run(llm, {"taps": [FIRST]})
        np.testing.assert_allclose(found.taps[FIRST], whole.taps[FIRST][-6:], rtol=1e-5, atol=1e-6)


def test_only_those_who_ask_get_rows_and_nobody_is_changed(llm: LLM) -> None:
    (alone,) = run(llm, {})
    found = run(llm, {}, {"taps": [SECOND]}, {"taps": [FIRST, SECOND], "tap_prompt": True})
    assert [list(f.taps or ()) for f in found] == [[], [SECOND], [FIRST, SECOND]]
    assert {tuple(f.token_ids) for f in found} == {tuple(alone.token_ids)}


def test_a_vector_is_added_for_its_request_alone(llm: LLM) -> None:
    vector = torch.linspace(-2, 2, HIDDEN).tolist()
    (plain,) = run(llm, {"taps": [FIRST], "tap_prompt": True})
    before, moved, after = run(
        llm,
        {"taps": [FIRST], "tap_prompt": True},
        {"taps": [FIRST], "tap_prompt": True, "steer": {FIRST: vector}},
        {"taps": [FIRST], "tap_prompt": True},
    )
    for other in (before, after):
        assert other.token_ids == plain.token_ids
        np.testing.assert_allclose(other.taps[FIRST], plain.taps[FIRST], rtol=1e-5, atol=1e-6)
    difference = moved.taps[FIRST][: len(PROMPT)] - plain.taps[FIRST][: len(PROMPT)]
    expected = np.tile(np.float32(vector), (len(PROMPT), 1))
    np.testing.assert_allclose(difference, expected, rtol=1e-4, atol=1e-4)


def test_steered_prefixes_are_not_shared_with_others(llm: LLM) -> None:
    vector = {FIRST: [3.0] * HIDDEN}
    (first,) = run(llm, {"steer": vector})
    (plain,) = run(llm, {})
    (again,) = run(llm, {"steer": vector})
    assert first.token_ids == again.token_ids
    assert plain.token_ids != first.token_ids
    (fresh,) = run(llm, {"taps": [FIRST], "tap_prompt": True})  # never takes a cached prefix
    assert fresh.token_ids == plain.token_ids


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"taps": ["model.layer.0"]}, "did you mean 'model.layers.0'"),
        ({"steer": {SECOND: [0.0] * HIDDEN}}, r"steer has no point 'model.layers.1'"),
        ({"steer": {FIRST: [0.0] * 3}}, "has 3 numbers, must have 64"),
        (
            {"steer": {FIRST: [0.5, float("nan")] * (HIDDEN // 2)}},
            r"steer\['model.layers.0'\]\[1\]=nan cannot be used: numbers must be finite and in",
        ),
        ({"taps": [FIRST], "n": 2, "temperature": 1.0}, "taps need n=1"),
    ],
)
def test_what_cannot_be_is_refused(llm: LLM, params: dict[str, Any], message: str) -> None:
    base = {"temperature": 0.0, "max_tokens": 4, "detokenize": False}
    with pytest.raises(InvalidRequest, match=message):
        llm.generate([{"prompt_token_ids": PROMPT}], SamplingParams(**{**base, **params}))


def test_too_many_bytes_are_refused(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxlm.runtime.points.MAX_TAP_BYTES", 1000)
    with pytest.raises(InvalidRequest, match="taps of up to 6 tokens take 1536 bytes, and 1000"):
        run(llm, {"taps": [FIRST]})


def test_a_refused_request_leaves_none_behind(llm: LLM) -> None:
    good = SamplingParams(max_tokens=4, detokenize=False)
    bad = SamplingParams(max_tokens=4, detokenize=False, taps=["nowhere"])
    with pytest.raises(InvalidRequest):
        llm.generate([{"prompt_token_ids": PROMPT}] * 2, [good, bad])
    assert llm.engine.num_unfinished == 0
