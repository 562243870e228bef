"""Drafts over the fake model: the same tokens in fewer steps, whatever else goes on."""

import asyncio
import itertools
import logging
import sys
from collections.abc import Callable

import pytest

from fxlm.runtime.drafters.base import Drafter
from fxlm.runtime.engine import Engine, EngineConfig
from fxlm.runtime.sequence import Sequence
from tests.runtime.fake import FakeDrafter, FakeWorker, expect, score, spec, speculating
from tests.runtime.test_engine import drain, request, tokens


def never(prefix: list[int]) -> bool:
    return False


def always(prefix: list[int]) -> bool:
    return True


def sometimes(prefix: list[int]) -> bool:
    return sum(prefix) % 3 == 0


def make(
    wrong: Callable[[list[int]], bool] = never, *, drafts: int = 3, most: int = 99, **sizes: int
) -> Engine:
    worker = FakeWorker(spec(max_drafts=drafts, **sizes))
    return speculating(worker, FakeDrafter(wrong, most), EngineConfig(check=True))


def steps(engine: Engine) -> int:
    return engine.worker.num_steps  # type: ignore[attr-defined, no-any-return]


def test_right_drafts_save_steps() -> None:
    engine = make()
    engine.add_request(request("a", 5, max_tokens=9))
    news = drain(engine)["a", 0]
    assert tokens(news) == expect(request("a", 5, max_tokens=9))
    assert [len(output.token_ids) for output in news] == [1, 4, 4]
    stats = engine.stats()
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (2, 6, 6)
    assert stats.accepted_per_position == [2, 2, 2]


def test_wrong_drafts_cost_no_token_and_their_blocks_go_back() -> None:
    engine = make(always, block_size=1)
    engine.add_request(request("a", 5, max_tokens=6))
    engine.step()
    while engine.has_unfinished():
        engine.step()
        held = sum(len(s.blocks) - s.num_computed for s in engine.scheduler.running)
        assert held == 0
    assert steps(engine) == 6
    assert engine.stats().num_accepted_tokens == 0


@pytest.mark.parametrize("wrong", [never, sometimes, always])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_blocks": 16, "max_model_len": 40},
        {"max_num_batched_tokens": 5},
        {"max_num_seqs": 3},
        {"block_size": 1, "num_blocks": 200},
    ],
)
def test_many_requests_give_the_same_tokens(
    wrong: Callable[[list[int]], bool], sizes: dict[str, int]
) -> None:
    engine = make(wrong, **sizes)
    wanted = [request(str(i), [i] * (3 + i), max_tokens=12 + i) for i in range(6)]
    wanted.append(request("forks", 10, n=4, temperature=1.0, seed=5, max_tokens=12))
    wanted.append(request("sampled", 7, temperature=1.0, seed=6, max_tokens=12))
    for item in wanted:
        engine.add_request(item)
    news = drain(engine)
    limit = sizes.get("max_model_len", 64)
    for item in wanted:
        for index in range(item.params.n):
            assert tokens(news[item.request_id, index]) == expect(item, index, limit)
    if "num_blocks" in sizes and sizes["num_blocks"] == 16:
        assert engine.stats().num_preemptions > 0


def test_only_accepted_tokens_get_into_the_prefix_cache() -> None:
    engine = make(sometimes, block_size=2)
    item = request("a", 6, max_tokens=20)
    engine.add_request(item)
    drain(engine)
    full = [*item.prompt_token_ids, *expect(item)]
    engine.add_request(request("b", full, max_tokens=10))
    news = drain(engine)["b", 0]
    assert news[0].num_cached_tokens == 24  # all but the last token of 26 were computed
    assert tokens(news) == expect(request("b", full, max_tokens=10))


def test_logprobs_come_with_every_token() -> None:
    engine = make(sometimes)
    item = request("a", 9, logprobs=1, prompt_logprobs=1, max_tokens=12)
    engine.add_request(item)
    outputs = drain(engine)["a", 0]
    output, place = expect(item), 0
    assert tokens(outputs) == output
    assert len(outputs[0].prompt_logprobs or ()) == 8
    assert len(outputs) < 12
    for news in outputs:
        assert news.logprobs is not None
        assert len(news.logprobs) == len(news.token_ids)
        for token, found in zip(news.token_ids, news.logprobs, strict=True):
            prefix = item.prompt_token_ids + output[:place]
            assert found == [(token, score(prefix, token), 7), (0, score(prefix, 0), 1)]
            place += 1


def test_an_end_within_a_draft_drops_the_rest() -> None:
    plain = expect(request("a", 5))
    engine = make()
    engine.add_request(request("stop", 5, stop_token_ids=[plain[2]]))
    engine.add_request(request("length", 5, max_tokens=3))
    engine.add_request(request("min", 5, min_tokens=4, stop_token_ids=plain[:6]))
    engine.add_request(request("context", 60, max_tokens=None))
    news = drain(engine)
    assert tokens(news["stop", 0]) == plain[:3]
    assert news["stop", 0][-1].stop_reason == plain[2]
    assert tokens(news["length", 0]) == plain[:3]
    assert tokens(news["min", 0]) == expect(
        request("min", 5, min_tokens=4, stop_token_ids=plain[:6])
    )
    assert len(tokens(news["context", 0])) == 4
    assert not engine.speculator.drafter.alive  # type: ignore[union-attr]


def test_an_abort_between_steps() -> None:
    engine = make()
    engine.add_request(request("a", 5, max_tokens=40))
    engine.add_request(request("b", 6, max_tokens=12))
    for _ in range(3):
        engine.step()
    engine.abort("a")
    news = drain(engine)
    assert news["a", 0][-1].finish_reason == "abort"
    assert news["b", 0][-1].finish_reason == "length"


def test_a_small_budget_of_drafts_goes_to_the_first() -> None:
    engine = make(drafts=3, max_num_seqs=4, max_num_batched_tokens=8)
    for name in "abcd":
        engine.add_request(request(name, 2, max_tokens=12))
    drain(engine)
    assert engine.stats().num_drafts > 0


def test_drafts_leave_room_for_prompts() -> None:
    engine = make(drafts=8, max_num_batched_tokens=8)
    engine.add_request(request("old", 4, max_tokens=50))
    engine.step()
    engine.add_request(request("new", 12, max_tokens=2))
    for _ in range(4):
        engine.step()
    assert engine.stats().prompt_tokens == 4 + 12  # its first token is out


def test_drafts_preempt_nobody() -> None:
    """12 usable blocks hold both sequences, and nothing beside them."""
    engine = make(always, drafts=8, num_blocks=13, max_model_len=24)
    for name in "ab":
        engine.add_request(request(name, 8, max_tokens=16))
    news = drain(engine)
    assert engine.stats().num_preemptions == 0
    for name in "ab":
        assert tokens(news[name, 0]) == expect(request(name, 8, max_tokens=16), 0, 24)


class Broken(Drafter):
    """Fails in one of several ways at its second call."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.calls = 0

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[list[int]]:
        self.calls += 1
        if self.calls < 2:
            return [[1] for _ in sequences]
        if self.how == "raise":
            raise KeyError("mine")
        if self.how == "exit":
            sys.exit(3)
        if self.how == "cancel":  # no Exception
            raise asyncio.CancelledError
        return {"few": [], "outside": [[999]], "text": [["x"]], "none": [None], "digit": [["3"]],
                "float": [[3.5]]}[self.how]  # type: ignore[return-value]  # fmt: skip


@pytest.mark.parametrize(
    "how", ["raise", "exit", "cancel", "few", "outside", "text", "none", "digit", "float"]
)
def test_a_bad_drafter_is_switched_off_and_requests_go_on(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    drafter = Broken(how)
    engine = speculating(FakeWorker(spec(max_drafts=3)), drafter, EngineConfig(check=True))
    engine.add_request(request("a", 5))
    with caplog.at_level(logging.WARNING):
        news = drain(engine)
    assert tokens(news["a", 0]) == expect(request("a", 5))
    assert drafter.calls == 2
    assert "Broken failed; nothing is drafted any more" in caplog.text


class Endless(Drafter):
    """Goes on drafting for ever."""

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[list[int]]:
        return [itertools.repeat(1) for _ in sequences]  # type: ignore[misc]


def test_of_an_endless_draft_only_what_was_asked_for_is_taken() -> None:
    drafter = Endless()
    engine = speculating(FakeWorker(spec(max_drafts=3)), drafter, EngineConfig(check=True))
    engine.add_request(request("a", 5))
    assert tokens(drain(engine)["a", 0]) == expect(request("a", 5))
