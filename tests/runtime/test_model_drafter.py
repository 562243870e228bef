"""The drafter that is a model: the fake model drafts for itself, with a cache of its own."""

from typing import Any

import pytest

from fxlm.runtime.drafters.draft_model import ModelDrafter
from fxlm.runtime.engine import Engine, EngineConfig
from fxlm.runtime.step import StepResult
from tests.runtime.fake import FakeWorker, expect, spec, speculating
from tests.runtime.test_engine import drain, request, tokens


class Forgetful(FakeWorker):
    """A draft that is wrong in every third token or so."""

    def run(self, batch: Any) -> StepResult:
        result = super().run(batch)
        result.token_ids = [(t + 1) % 256 if t % 3 == 0 else t for t in result.token_ids]
        return result


def make(
    draft: type[FakeWorker] = FakeWorker, *, own: dict[str, int] | None = None, **sizes: int
) -> tuple[Engine, ModelDrafter]:
    worker = FakeWorker(spec(max_drafts=3, **sizes))
    drafter = ModelDrafter(draft(spec(**{**sizes, **(own or {})})))
    return speculating(worker, drafter, EngineConfig(check=True)), drafter


def finish(engine: Engine, drafter: ModelDrafter) -> dict[Any, Any]:
    news = drain(engine)
    assert engine.speculator is not None
    assert engine.speculator.drafter is drafter, "it was switched off"
    drafter.scheduler.check()
    assert drafter.scheduler.pool.num_used == 0
    assert not drafter.scheduler.running
    return news


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_equal_to_the_target_is_always_right(temperature: float) -> None:
    engine, drafter = make()
    item = request("a", 5, max_tokens=13, temperature=temperature, seed=3)
    engine.add_request(item)
    news = finish(engine, drafter)
    assert tokens(news["a", 0]) == expect(item)
    stats = engine.stats()
    assert stats.num_accepted_tokens == stats.num_draft_tokens == 9
    # the prompt with the first output; then, beside what it guessed, two tokens a round
    assert drafter.worker.num_tokens == 6 + 2 + (2 + 2) * 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("sizes", "own"),
    [
        ({}, {}),
        ({"num_blocks": 16, "max_model_len": 40}, {}),
        ({}, {"num_blocks": 14}),
        ({"max_num_batched_tokens": 24}, {"max_num_batched_tokens": 3}),
        ({"max_num_seqs": 3}, {"block_size": 2}),
        ({}, {"max_model_len": 20}),
        ({"block_size": 1, "num_blocks": 200}, {}),
    ],
)
def test_the_same_tokens_however_the_draft_is_doing(
    sizes: dict[str, int], own: dict[str, int]
) -> None:
    engine, drafter = make(Forgetful, own=own, **sizes)
    wanted = [request(str(i), [i] * (3 + i), max_tokens=12 + i) for i in range(6)]
    wanted.append(request("forks", 10, n=4, temperature=1.0, seed=5, max_tokens=12))
    wanted.append(request("bans", 9, min_tokens=6, stop_token_ids=list(range(0, 250, 3))))
    for item in wanted:
        engine.add_request(item)
    news = finish(engine, drafter)
    for item in wanted:
        for index in range(item.params.n):
            limit = sizes.get("max_model_len", 64)
            assert tokens(news[item.request_id, index]) == expect(item, index, limit)
    stats = engine.stats()
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens


def test_long_prompts_are_drafted_for_once_they_are_in_its_cache() -> None:
    engine, drafter = make(own={"max_num_batched_tokens": 4})
    engine.add_request(request("a", 30, max_tokens=20))
    news = finish(engine, drafter)
    assert tokens(news["a", 0]) == expect(request("a", 30, max_tokens=20))
    # 31 tokens at four a step and three steps a call: drafts begin with the third
    assert [len(output.token_ids) for output in news["a", 0]][:5] == [1, 1, 1, 2, 4]


def test_prompts_are_shared_by_the_prefix_cache_of_the_draft() -> None:
    engine, drafter = make()
    engine.add_request(request("a", 20, n=4, temperature=1.0, seed=2, max_tokens=6))
    finish(engine, drafter)
    # 21 tokens once, then the five that are no whole block; and no more than two a guess
    assert drafter.worker.num_tokens <= 21 + 3 * 6 + 4 * 2 * 5  # type: ignore[attr-defined]


def test_an_abort_frees_the_cache_of_the_draft() -> None:
    engine, drafter = make()
    engine.add_request(request("a", 20, max_tokens=30))
    for _ in range(3):
        engine.step()
    assert drafter.scheduler.pool.num_used > 0
    engine.abort("a")
    assert drafter.scheduler.pool.num_used == 0
    finish(engine, drafter)
