"""Text of outputs: any chunking gives the text of decoding at once; stop strings; log-probs."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxlm.runtime.detokenize import CONTEXT_TOKENS, Detokenizer, StopStrings
from fxlm.runtime.messages import Output
from fxlm.runtime.outputs import Logprob, OutputKind, OutputProcessor, RequestOutput
from fxlm.runtime.request import Request
from fxlm.runtime.sampling_params import SamplingParams

SPECIAL = 0


class ByteTokenizer:
    """Tokens are byte strings, borders of characters notwithstanding; token 0 is special."""

    def __init__(self, vocabulary: Sequence[bytes]) -> None:
        self.vocabulary = [b"<end>", *vocabulary]

    def encode(self, text: str) -> list[int]:
        return [self.vocabulary.index(bytes([byte])) for byte in text.encode()]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        kept = [i for i in ids if not (skip_special_tokens and i == SPECIAL)]
        return b"".join(self.vocabulary[i] for i in kept).decode("utf-8", "replace")


class SpaceTokenizer(ByteTokenizer):
    """Like SentencePiece: a mark stands for a space, and the first one of a text vanishes."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return super().decode(ids, skip_special_tokens).replace("_", " ").removeprefix(" ")


PLAIN = ByteTokenizer([bytes([byte]) for byte in range(256)])
pieces = st.lists(
    st.sampled_from([*"aé€😀_".encode().decode(), "ab", "_a", "�"]).map(str.encode)
    | st.binary(min_size=1, max_size=3)
    | st.sampled_from([b"\xf0", b"\x9f\x98", b"\x80", b"\xe2\x82"]),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(
    vocabulary=pieces,
    data=st.data(),
    kind=st.sampled_from([ByteTokenizer, SpaceTokenizer]),
    skip=st.booleans(),
    repeat=st.sampled_from([1, 1, 9]),
)
def test_any_chunking_gives_the_text_of_decoding_at_once(
    vocabulary: list[bytes], data: st.DataObject, kind: type[ByteTokenizer], skip: bool, repeat: int
) -> None:
    tokenizer = kind(vocabulary)
    ids = data.draw(st.lists(st.integers(0, len(vocabulary)), max_size=30)) * repeat
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    bounds = [0, *cuts, len(ids)]
    parts = [detokenizer.push(ids[a:b]) for a, b in pairwise(bounds)]
    assert "".join([*parts, detokenizer.flush()]) == tokenizer.decode(ids, skip)


def test_a_character_is_whole_or_not_there() -> None:
    detokenizer = Detokenizer(PLAIN)
    assert [detokenizer.push([t]) for t in PLAIN.encode("é😀")] == ["", "é", "", "", "", "😀"]
    assert detokenizer.push(PLAIN.encode("a😀")[:-1]) == "a"
    assert detokenizer.flush() == "�"
    assert detokenizer.flush() == ""


def test_the_prompt_is_context_only() -> None:
    tokenizer = SpaceTokenizer([b"_a", b"_b"])
    assert Detokenizer(tokenizer).push([1, 2]) == "a b"
    assert Detokenizer(tokenizer, [2] * 20).push([1, 2]) == " a b"
    assert len(Detokenizer(tokenizer, [2] * 20)._window) == CONTEXT_TOKENS


def test_the_window_stays_small_on_garbage() -> None:
    for token in (PLAIN.encode("\0")[0] + 0x80, SPECIAL):
        detokenizer = Detokenizer(PLAIN)
        for _ in range(500):
            detokenizer.push([token])
            assert len(detokenizer._window) <= 64


# --- requests


def make(
    text: str | list[int], kind: OutputKind = "delta", **params: Any
) -> tuple[OutputProcessor, list[int]]:
    processor = OutputProcessor(PLAIN)
    request = Request(
        request_id="a", prompt_token_ids=PLAIN.encode("hi "), params=SamplingParams(**params)
    )
    processor.add_request(request, "hi ", kind)
    return processor, PLAIN.encode(text) if isinstance(text, str) else text


def stream(
    processor: OutputProcessor, ids: list[int], size: int = 1, reason: Any = "length"
) -> tuple[list[RequestOutput], list[tuple[str, int]]]:
    """Feed tokens in pieces as the engine would, the last with a finish reason."""
    results, aborts = [], []
    for begin in range(0, len(ids), size):
        output = Output(request_id="a", token_ids=ids[begin : begin + size])
        if begin + size >= len(ids):
            output.finish_reason = reason
        processed = processor.process([output])
        results += processed.outputs
        aborts += processed.aborts
        if aborts:
            break
    return results, aborts


def joined(results: list[RequestOutput]) -> str:
    return "".join(result.outputs[0].text for result in results if result.outputs)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab€", max_size=12),
    stops=st.lists(st.text("ab€", min_size=1, max_size=4), min_size=1, max_size=3),
    size=st.integers(1, 4),
    keep=st.booleans(),
)
def test_the_earliest_stop_string_ends_the_text(
    text: str, stops: list[str], size: int, keep: bool
) -> None:
    processor, ids = make(text, stop=stops, include_stop_str_in_output=keep)
    ids = ids or PLAIN.encode("a")
    text = PLAIN.decode(ids)
    # the first to be complete wins; among those complete at the same character the longest
    end = min((text.find(s) + len(s) for s in stops if s in text), default=None)
    results, aborts = stream(processor, ids, size)
    last = results[-1].outputs[0]
    assert results[-1].finished
    assert processor.num_requests == 0
    if end is None:
        assert joined(results) == text
        assert (last.finish_reason, last.stop_reason, aborts) == ("length", None, [])
        return
    stop = max((s for s in stops if text[:end].endswith(s)), key=len)
    assert joined(results) == text[: end if keep else end - len(stop)]
    assert (last.finish_reason, last.stop_reason) == ("stop", stop)
    assert bool(aborts) == (len(results) < -(-len(ids) // size)), "only if the engine goes on"


def _all_ids(results: list[RequestOutput]) -> list[int]:
    return [token for result in results for o in result.outputs for token in o.token_ids]


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    processor, ids = make("one END two ENDING", stop="ENDING")
    results, aborts = stream(processor, ids)
    texts = [result.outputs[0].text for result in results]
    assert texts[:9] == ["o", "n", "e", " ", "", "", "", "END ", "t"]
    assert joined(results) == "one END two "
    assert aborts == []  # the engine ended it with the same token


def test_a_stop_string_asks_for_an_abort_and_later_tokens_are_ignored() -> None:
    processor, ids = make("ab|cd", stop=["|"])
    results, aborts = stream(processor, ids)
    assert aborts == [("a", 0)]
    assert joined(results) == "ab"
    late = processor.process([Output(request_id="a", token_ids=ids[3:], finish_reason="abort")])
    assert (late.outputs, late.aborts) == ([], [])


def test_stop_strings_wait_for_min_tokens() -> None:
    processor, ids = make("..a..", stop=["."], min_tokens=3)
    results, _ = stream(processor, ids)
    assert joined(results) == "..a"
    assert _all_ids(results) == ids[:4]


@pytest.mark.parametrize(("keep", "text"), [(False, "ab"), (True, "ab!")])
def test_a_stop_token_is_not_text_unless_asked_for(keep: bool, text: str) -> None:
    processor, ids = make("ab!", include_stop_str_in_output=keep)
    results, _ = stream(processor, ids, reason="stop")
    assert joined(results) == text
    assert _all_ids(results) == ids


def test_special_tokens_are_skipped_if_asked_for() -> None:
    for skip, text in ((True, "ab"), (False, "a<end>b")):
        ids = [*PLAIN.encode("a"), SPECIAL, *PLAIN.encode("b")]
        processor, ids = make(ids, skip_special_tokens=skip)
        assert joined(stream(processor, ids)[0]) == text


def test_cumulative_and_final_outputs() -> None:
    processor, ids = make("abc", "cumulative")
    results, _ = stream(processor, ids)
    assert [r.outputs[0].text for r in results] == ["a", "ab", "abc"]
    assert [r.finished for r in results] == [False, False, True]
    assert results[-1].outputs[0].token_ids == ids
    assert results[-1].prompt == "hi "
    processor, ids = make("abc", "final")
    results, _ = stream(processor, ids)
    assert [r.outputs[0].text for r in results] == ["abc"]


def test_without_detokenizing_there_is_no_text_and_no_tokenizer_is_needed() -> None:
    processor = OutputProcessor(None)
    params = SamplingParams(detokenize=False)
    processor.add_request(Request(request_id="a", prompt_token_ids=[1], params=params))
    (result,) = stream(processor, [5])[0]
    assert (result.outputs[0].text, result.outputs[0].token_ids) == ("", [5])


def test_logprobs_are_named_and_summed() -> None:
    processor, _ = make("", logprobs=1, prompt_logprobs=0)
    a, b = PLAIN.encode("ab")
    output = Output(
        request_id="a",
        token_ids=[a, b],
        logprobs=[[(a, -1.0, 2), (b, -0.5, 1)], [(b, -0.25, 1), (b, -0.25, 1)]],
        prompt_logprobs=[[(a, -3.0, 9)], [(b, -4.0, 8)]],
        finish_reason="length",
        num_cached_tokens=2,
        num_preemptions=1,
    )
    (result,) = processor.process([output]).outputs
    completion = result.outputs[0]
    assert completion.cumulative_logprob == -1.25
    assert completion.logprobs == [
        {a: Logprob(-1.0, 2, "a"), b: Logprob(-0.5, 1, "b")},
        {b: Logprob(-0.25, 1, "b")},
    ]
    assert result.prompt_logprobs == [None, {a: Logprob(-3.0, 9, "a")}, {b: Logprob(-4.0, 8, "b")}]
    assert (result.num_cached_tokens, result.num_preemptions) == (2, 1)


def test_completions_finish_one_by_one() -> None:
    processor, (a, b) = make("ab", n=2)
    first = processor.process([Output(request_id="a", index=1, token_ids=[a])]).outputs
    assert [o.index for o in first[0].outputs] == [1]
    news = [
        Output(request_id="a", index=0, token_ids=[b], finish_reason="length"),
        Output(request_id="unknown", token_ids=[b]),
    ]
    (second,) = processor.process(news).outputs
    assert not second.finished
    error = Output(request_id="a", index=1, finish_reason="error", message="broken")
    (third,) = processor.process([error]).outputs
    assert third.finished
    assert third.outputs[0].message == "broken"


def test_num_held_is_the_longest_possible_beginning() -> None:
    stops = StopStrings(["abab", "b"])
    assert [stops.num_held(text) for text in ("", "a", "ab", "aba", "xaba", "x")] == [
        0, 1, 2, 3, 3, 0,
    ]  # fmt: skip
