"""Penalty lists against a plain recount, and the parts of a batch that the fake model ignores."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fxlm.runtime.adjust import Adjust
from fxlm.runtime.batch import Batch
from fxlm.runtime.engine import Engine
from fxlm.runtime.request import Request
from fxlm.runtime.sampling_params import SamplingParams
from tests.runtime.fake import FakeWorker, spec

TOKENS = st.integers(0, 7)


def recount(request: Request, output: list[int]) -> dict[int, tuple[int, float]]:
    """What the op must see: id -> (count, bias)."""
    params, prompt = request.params, request.prompt_token_ids
    biases = {t: min(max(b, -100.0), 100.0) for t, b in (params.logit_bias or {}).items()}
    if len(output) < params.min_tokens:
        stops = [*request.eos_token_ids, *(params.stop_token_ids or [])]
        biases |= dict.fromkeys(stops, -np.inf)
    listed: dict[int, tuple[int, float]] = {}
    for token in range(8):
        count = output.count(token) if params.has_penalties else 0
        in_prompt = params.repetition_penalty != 1.0 and token in prompt
        if count or in_prompt or token in biases:
            seen = count if count or in_prompt else -1
            listed[token] = seen, biases.get(token, 0.0)
    return listed


@settings(max_examples=150, deadline=None)
@given(
    prompt=st.lists(TOKENS, min_size=1, max_size=6),
    output=st.lists(TOKENS, max_size=10),
    penalties=st.sampled_from(
        [{}, {"repetition_penalty": 1.2}, {"presence_penalty": 1.0}, {"frequency_penalty": -1.0}]
    ),
    bias=st.none() | st.dictionaries(TOKENS, st.floats(-200, 200, width=16), max_size=3),
    min_tokens=st.integers(0, 6),
    stops=st.lists(TOKENS, max_size=3),
    skip=st.integers(1, 3),
    guess=st.lists(TOKENS, max_size=4),
)
def test_lists_equal_a_recount(
    prompt: list[int],
    output: list[int],
    penalties: dict[str, Any],
    bias: dict[int, float] | None,
    min_tokens: int,
    stops: list[int],
    skip: int,
    guess: list[int],
) -> None:
    params = SamplingParams(
        **penalties, logit_bias=bias, min_tokens=min_tokens, stop_token_ids=stops, max_tokens=20
    )
    request = Request(
        request_id="a", prompt_token_ids=prompt, params=params, eos_token_ids=[3, 999]
    )
    adjust = Adjust(request, 8)
    known = Request(request_id="a", prompt_token_ids=prompt, params=params, eos_token_ids=[3])
    for length in range(0, len(output) + 1, skip):
        size = adjust.extend(output[adjust.num_seen - len(prompt) : length])
        ids = adjust.ids[:size].tolist()
        assert len(set(ids)) == len(ids)
        pairs = zip(adjust.counts[:size].tolist(), adjust.bias[:size].tolist(), strict=True)
        neutral = (-1, 0.0)  # an entry that changes nothing may stay
        got = {i: pair for i, pair in zip(ids, pairs, strict=True) if pair != neutral}
        wanted = recount(known, output[:length])
        assert got == {i: pair for i, pair in wanted.items() if pair != neutral}
        adjust.extend(guess)  # a guess that is taken back leaves no trace
        adjust.rewind(guess)


def test_adjusts_of_a_batch_lie_in_their_rows_and_grow() -> None:
    engine = Engine(FakeWorker(spec()))
    engine.batch = Batch(engine.spec, num_adjusts=2)
    prompts = {"plain": [1], "bias": [2, 3], "penalty": [4, 5, 4]}
    options = {
        "plain": SamplingParams(temperature=0.0, prompt_logprobs=1),
        "bias": SamplingParams(temperature=0.0, logit_bias={9: 500.0, 8: -1.0}),
        "penalty": SamplingParams(temperature=0.0, repetition_penalty=1.5),
    }
    for name, params in options.items():
        engine.add_request(Request(request_id=name, prompt_token_ids=prompts[name], params=params))
    engine.step()
    views = {name: tensor.tolist() for name, tensor in engine.batch.tensors().items()}
    assert views["adjust_start"] == [0, 0, 2, 4]
    assert views["adjust_ids"] == [9, 8, 4, 5]
    assert views["adjust_counts"] == [-1, -1, 0, 0]
    assert views["adjust_bias"] == [100.0, -1.0, 0.0, 0.0]
    for name in ("bias", "penalty"):
        engine.abort(name)
    engine.step()
    views = {name: tensor.tolist() for name, tensor in engine.batch.tensors().items()}
    assert views["adjust_start"] == [0, 0]
    assert (views["adjust_ids"], views["adjust_counts"]) == ([0], [0])
    assert views["adjust_bias"] == [0.0]


def test_rows_carry_the_options_and_tables_are_padded_with_zero() -> None:
    engine = Engine(FakeWorker(spec(max_num_seqs=2)))
    long = Request(request_id="l", prompt_token_ids=[1] * 20, params=SamplingParams(max_tokens=1))
    engine.add_request(long)
    engine.step()  # leaves a long row in the slot that "a" takes next
    params = SamplingParams(
        temperature=0.5, top_p=0.25, min_p=0.125, repetition_penalty=2.0, top_k=7, seed=11
    )
    engine.add_request(Request(request_id="a", prompt_token_ids=[9, 8], params=params))
    engine.add_request(Request(request_id="b", prompt_token_ids=[2] * 9))
    engine.step()
    views = engine.batch.tensors()
    assert views["sample_floats"][0].tolist() == [0.5, 0.25, 0.125, 2.0, 0.0, 0.0]
    assert views["sample_ints"][0].tolist() == [7, 11, 2, -1, -1]
    assert views["query_start"].tolist() == [0, 2, 11]
    assert views["logits_indices"].tolist() == [1, 10]
    table = views["block_table"]
    assert table.shape == (2, 3)
    assert (table[0] != 0).tolist() == [True, False, False]
    engine.step()
    assert engine.batch.tensors()["sample_ints"][0].tolist() == [7, 11, 3, -1, -1]


def test_buffers_never_move() -> None:
    engine = Engine(FakeWorker(spec()))
    addresses = set()
    for number in range(3):
        engine.add_request(Request(request_id=str(number), prompt_token_ids=[1] * (number + 1)))
        engine.step()
        addresses.add(tuple(t.data_ptr() for t in engine.batch.tensors().values()))
    assert len(addresses) == 1


def test_more_entries_than_the_first_arrays_hold() -> None:
    ids = list(range(40))
    params = SamplingParams(repetition_penalty=1.1, logit_bias={i: float(i) for i in range(40, 80)})
    made = Adjust(Request(request_id="0", prompt_token_ids=ids, params=params), 100)
    assert made.size == 80
    assert made.ids[:80].tolist() == list(range(80))
    assert made.counts[:80].tolist() == [0] * 40 + [-1] * 40
    assert made.bias[40:80].tolist() == [float(i) for i in range(40, 80)]
