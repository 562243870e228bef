"""The engine over the fake model: every way to the same tokens, every way to end."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from fxlm.compiler.errors import EngineDead, InvalidRequest, OutOfMemory
from fxlm.runtime.batch import Batch
from fxlm.runtime.engine import Engine, EngineConfig
from fxlm.runtime.messages import Output
from fxlm.runtime.request import Request
from fxlm.runtime.sampling_params import SamplingParams
from fxlm.runtime.step import StepResult
from tests.runtime.fake import FakeWorker, expect, score, spec


def make(
    fault: dict[int, Exception] | None = None, *, caching: bool = True, **sizes: int
) -> Engine:
    worker = FakeWorker(spec(**sizes), fault=fault)
    return Engine(worker, EngineConfig(check=True, enable_prefix_caching=caching))


def request(name: str, prompt: list[int] | int, **params: object) -> Request:
    tokens = [(7 * i) % 250 for i in range(prompt)] if isinstance(prompt, int) else prompt
    options = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **params})
    return Request(request_id=name, prompt_token_ids=tokens, params=options)


def drain(engine: Engine, limit: int = 5000) -> dict[tuple[str, int], list[Output]]:
    """Step until nothing is left; gives the outputs by completion."""
    news: dict[tuple[str, int], list[Output]] = {}
    for _ in range(limit):
        if not engine.has_unfinished():
            break
        for output in engine.step():
            news.setdefault((output.request_id, output.index), []).append(output)
    assert not engine.has_unfinished(), "starved"
    assert engine.scheduler.pool.num_used == 0
    assert all(outputs[-1].finish_reason for outputs in news.values())
    assert not any(o.finish_reason for outputs in news.values() for o in outputs[:-1])
    return news


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_one_request_gives_the_models_tokens() -> None:
    engine = make()
    engine.add_request(request("a", 5))
    news = drain(engine)
    assert tokens(news["a", 0]) == expect(request("a", 5))
    assert news["a", 0][-1].finish_reason == "length"
    assert engine.worker.num_steps == 8  # type: ignore[attr-defined]


def test_a_long_prompt_goes_in_chunks() -> None:
    engine = make(max_num_batched_tokens=4)
    engine.add_request(request("a", 21))
    assert tokens(drain(engine)["a", 0]) == expect(request("a", 21))
    assert engine.worker.num_steps == 6 + 7  # type: ignore[attr-defined]


def test_many_requests_share_steps_and_give_the_same_tokens() -> None:
    engine = make()
    wanted = [request(str(i), 3 + i, max_tokens=3 + i) for i in range(12)]
    for item in wanted:
        engine.add_request(item)
    news = drain(engine)
    assert all(tokens(news[item.request_id, 0]) == expect(item) for item in wanted)
    assert engine.worker.num_steps < 40  # type: ignore[attr-defined]


def test_a_cached_prefix_is_not_computed_again() -> None:
    engine = make()
    engine.add_request(request("a", 20))
    drain(engine)
    before = engine.worker.num_tokens  # type: ignore[attr-defined]
    engine.add_request(request("b", 20, max_tokens=1))
    news = drain(engine)
    assert news["b", 0][0].num_cached_tokens == 16  # the last block must run: a token is left
    assert engine.worker.num_tokens - before == 4  # type: ignore[attr-defined]
    assert tokens(news["b", 0]) == expect(request("b", 20, max_tokens=1))
    stats = engine.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (40, 16)


def test_salts_and_the_switch_keep_prefixes_apart() -> None:
    engine = make()
    engine.add_request(request("a", 20))
    drain(engine)
    salted = Request(
        request_id="b", prompt_token_ids=request("a", 20).prompt_token_ids, cache_salt="tenant"
    )
    engine.add_request(salted)
    assert drain(engine)["b", 0][0].num_cached_tokens == 0
    engine = make(caching=False)
    for name in "ab":
        engine.add_request(request(name, 20))
        assert drain(engine)[name, 0][0].num_cached_tokens == 0


@pytest.mark.parametrize("caching", [True, False])
def test_preemption_changes_nothing_but_the_count(caching: bool) -> None:
    engine = make(num_blocks=12, max_model_len=40, caching=caching)
    wanted = [request(str(i), [i] * 6, max_tokens=30) for i in range(4)]
    for item in wanted:
        engine.add_request(item)
    news = drain(engine)
    assert all(tokens(news[item.request_id, 0]) == expect(item, 0, 40) for item in wanted)
    assert engine.stats().num_preemptions > 0
    assert sum(news[i.request_id, 0][-1].num_preemptions for i in wanted) == (
        engine.stats().num_preemptions
    )
    assert news["0", 0][-1].num_preemptions == 0  # the oldest never is


def test_forks_share_the_prompt_and_copy_on_write() -> None:
    engine = make()
    item = request("a", 10, n=4, temperature=1.0, seed=5)
    engine.add_request(item)
    news = drain(engine)
    outputs = [tokens(news["a", i]) for i in range(4)]
    assert outputs == [expect(item, i) for i in range(4)]
    assert len({tuple(output) for output in outputs}) == 4
    assert engine.worker.num_copies == 3  # type: ignore[attr-defined]
    assert engine.worker.num_tokens == 10 + 4 * 7  # type: ignore[attr-defined]


def test_forks_without_a_slot_wait_and_give_the_same() -> None:
    engine = make(max_num_seqs=3)
    item = request("a", 10, n=7, temperature=1.0, seed=5)
    engine.add_request(item)
    engine.add_request(request("b", 3))
    news = drain(engine)
    assert [tokens(news["a", i]) for i in range(7)] == [expect(item, i) for i in range(7)]


def test_a_sampled_request_without_seed_is_random_and_a_config_seed_repeats_it() -> None:
    def run(seed: int | None) -> list[int]:
        engine = Engine(FakeWorker(spec()), EngineConfig(seed=seed))
        engine.add_request(request("a", 3, temperature=1.0))
        return tokens(drain(engine)["a", 0])

    assert run(None) != run(None)
    assert run(3) == run(3)


def test_ends_by_eos_stop_token_and_context() -> None:
    output = expect(request("a", 5))
    plain = request("a", 5)
    engine = make()
    engine.add_request(
        Request(
            request_id="eos",
            prompt_token_ids=plain.prompt_token_ids,
            params=plain.params,
            eos_token_ids=[output[2], output[1]],
        )
    )
    engine.add_request(request("stop", 5, stop_token_ids=[output[3]]))
    engine.add_request(request("context", 60, max_tokens=None))
    news = drain(engine)
    assert tokens(news["eos", 0]) == output[:2]
    assert (news["eos", 0][-1].finish_reason, news["eos", 0][-1].stop_reason) == ("stop", output[1])
    assert tokens(news["stop", 0]) == output[:4]
    assert news["stop", 0][-1].stop_reason == output[3]
    assert len(tokens(news["context", 0])) == 4
    assert news["context", 0][-1].finish_reason == "length"
    assert engine.stats().finished == {"stop": 2, "length": 1}


def test_min_tokens_bans_the_end_and_ignore_eos_goes_past_it() -> None:
    output = expect(request("a", 5))
    engine = make()
    banned = request("min", 5, min_tokens=4, stop_token_ids=output[:6])
    engine.add_request(banned)
    engine.add_request(
        Request(
            request_id="ignore",
            prompt_token_ids=banned.prompt_token_ids,
            params=SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=8),
            eos_token_ids=[output[1]],
        )
    )
    news = drain(engine)
    assert tokens(news["min", 0]) == expect(banned)
    assert len(tokens(news["min", 0])) >= 5
    assert tokens(news["ignore", 0]) == output


@pytest.mark.parametrize("sizes", [{}, {"max_num_batched_tokens": 3}, {"max_score_rows": 2}])
def test_logprobs_of_prompt_and_output(sizes: dict[str, int]) -> None:
    engine = make(**sizes)
    item = request("a", 9, logprobs=2, prompt_logprobs=1)
    engine.add_request(request("warm", 9))  # prompt log-probabilities ignore the cached prefix
    drain(engine)
    engine.add_request(item)
    outputs = drain(engine)["a", 0]
    prompt, output = item.prompt_token_ids, expect(item)
    assert outputs[0].prompt_logprobs == [
        [(prompt[i], score(prompt[:i], prompt[i]), 7), (0, score(prompt[:i], 0), 1)]
        for i in range(1, 9)
    ]
    for i, news in enumerate(outputs):
        prefix = prompt + output[:i]
        ids = [output[i], 0, 1]
        ranks = [7, 1, 2]
        wanted = [(t, score(prefix, t), r) for t, r in zip(ids, ranks, strict=True)]
        assert news.logprobs == [wanted]
        assert (news.prompt_logprobs is None) == (i > 0)


def test_an_abort_frees_blocks_at_once_in_any_state() -> None:
    engine = make(max_num_batched_tokens=8)
    engine.add_request(request("running", 4))
    engine.add_request(request("partial", 30))
    engine.step()
    engine.add_request(request("waiting", 4))
    for name in ("running", "partial", "waiting"):
        engine.abort(name)
    assert engine.scheduler.pool.num_used == 0
    assert engine.scheduler.num_waiting == 0
    engine.abort("running")
    engine.abort("never heard of")
    outputs = engine.step()
    assert {o.request_id: o.finish_reason for o in outputs} == dict.fromkeys(
        ("running", "partial", "waiting"), "abort"
    )
    assert not engine.has_unfinished()


def test_one_completion_can_be_aborted() -> None:
    engine = make()
    item = request("a", 6, n=3, temperature=1.0, seed=1)
    engine.add_request(item)
    engine.step()
    engine.abort("a", 0)
    news = drain(engine)
    assert news["a", 0][-1].finish_reason == "abort"
    assert [tokens(news["a", i]) for i in (1, 2)] == [expect(item, i)[1:] for i in (1, 2)]


def test_what_can_never_fit_fails_alone() -> None:
    engine = make(num_blocks=6, max_model_len=64)
    engine.add_request(request("ok", 4))
    engine.add_request(request("prompt", 30))
    engine.add_request(request("grows", 10, max_tokens=40))
    news = drain(engine)
    assert tokens(news["ok", 0]) == expect(request("ok", 4))
    for name in ("prompt", "grows"):
        assert news[name, 0][-1].finish_reason == "error"
        assert "20 tokens" in news[name, 0][-1].message
    assert len(tokens(news["grows", 0])) == 11  # 5 blocks hold 20; the 21st is drawn, not kept


def test_out_of_memory_fails_the_batch_and_the_engine_goes_on() -> None:
    engine = make({2: OutOfMemory("no memory")}, max_num_seqs=2)
    engine.add_request(request("a", 4, n=2, temperature=1.0, seed=3))
    engine.step()  # the forks take both slots
    engine.add_request(request("b", 4))
    news = drain(engine)
    assert [news["a", i][-1].finish_reason for i in range(2)] == ["error"] * 2
    assert news["a", 1][-1].message == "no memory"
    assert tokens(news["b", 0]) == expect(request("b", 4))


@pytest.fixture
def ctrl_c() -> Iterator[Any]:
    """Python's own handler, which a process started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("depth", [1, 2])
def test_ctrl_c_waits_for_the_end_of_the_step_and_nothing_is_lost(depth: int, ctrl_c: Any) -> None:
    class Interrupted(FakeWorker):
        def run(self, batch: Batch) -> StepResult:
            if self.num_steps in (1, 2):
                signal.raise_signal(signal.SIGINT)
            return super().run(batch)

    engine = Engine(Interrupted(spec(), depth=depth), EngineConfig(check=True))
    engine.add_request(request("a", 4, n=3, temperature=1.0, seed=3))
    engine.add_request(request("b", 4))
    interrupts = 0
    found: dict[tuple[str, int], list[int]] = {}
    while engine.has_unfinished():
        try:
            for output in engine.step():
                found.setdefault((output.request_id, output.index), []).extend(output.token_ids)
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts >= 1
    assert signal.getsignal(signal.SIGINT) is ctrl_c
    assert found["b", 0] == expect(request("b", 4))
    for index in range(3):
        wanted = request("a", 4, n=3, temperature=1.0, seed=3)
        assert found["a", index] == expect(wanted, index)


def test_any_other_exception_ends_the_engine_with_its_reason() -> None:
    engine = make({2: RuntimeError("cable cut")})
    engine.add_request(request("a", 4))
    engine.add_request(request("b", 4))
    engine.step()
    with pytest.raises(EngineDead, match="RuntimeError: cable cut"):
        engine.step()
    told = engine.fail_all(engine.dead or "")
    assert {(o.request_id, o.finish_reason, o.message) for o in told} == {
        ("a", "error", "RuntimeError: cable cut"),
        ("b", "error", "RuntimeError: cable cut"),
    }
    with pytest.raises(EngineDead, match="cable cut"):
        engine.add_request(request("c", 4))
    with pytest.raises(EngineDead, match="cable cut"):
        engine.step()


def test_bad_requests_name_their_field_and_queue_nothing() -> None:
    engine = make()
    for prompt in ([], [1] * 64, [256], [-1]):
        with pytest.raises(InvalidRequest) as caught:
            engine.add_request(request("a", prompt))
        assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequest, match="64 tokens and the context of this model is 64"):
        engine.add_request(request("a", [1] * 64))
    engine.add_request(request("a", 3))
    with pytest.raises(InvalidRequest, match="in use"):
        engine.add_request(request("a", 3))
    with pytest.raises(InvalidRequest, match="priority"):
        engine.add_request(Request(request_id="p", prompt_token_ids=[1], priority=1))
    drain(engine)


def test_priority_goes_first_and_age_next() -> None:
    worker = FakeWorker(spec(max_num_seqs=1))
    engine = Engine(worker, EngineConfig(policy="priority", check=True))
    for name, priority in (("late", 5), ("first", 1), ("second", 1)):
        engine.add_request(Request(request_id=name, prompt_token_ids=[1, 2], priority=priority))
    order = list(dict.fromkeys(name for name, _ in drain(engine)))
    assert order == ["first", "second", "late"]


def test_ten_thousand_wait_without_being_looked_at() -> None:
    engine = make(max_num_seqs=2)
    for i in range(10_000):
        engine.add_request(request(str(i), 4, max_tokens=2))
    assert engine.stats().num_waiting == 10_000
    scheduler = engine.scheduler
    looked = 0
    peek = scheduler._peek

    def counting() -> object:
        nonlocal looked
        looked += 1
        return peek()

    scheduler._peek = counting  # type: ignore[method-assign, assignment]
    engine.step()
    assert looked <= 3
    for i in range(2, 10_000):
        engine.abort(str(i))
    assert len(scheduler._waiting) < 200  # tombstones do not pile up
    drain(engine)


def test_the_stats_add_up() -> None:
    engine = make(max_num_batched_tokens=16)
    for i in range(3):
        engine.add_request(request(str(i), 10, max_tokens=4))
    drain(engine)
    stats = engine.stats()
    assert stats.prompt_tokens == 30
    assert stats.generation_tokens == 12
    assert stats.finished == {"length": 3}
    assert sum(stats.iteration_tokens) == stats.num_steps
    assert stats.iteration_tokens_sum == engine.worker.num_tokens  # type: ignore[attr-defined]
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)


@pytest.mark.parametrize("num_blocks", [6, 7, 8, 20])
def test_a_planned_sequence_loses_its_place_and_its_copy_when_preempted(num_blocks: int) -> None:
    """Six forks of two requests write to shared blocks in one step, the less urgent ones first."""
    worker = FakeWorker(spec(num_blocks=num_blocks, max_num_batched_tokens=8))
    engine = Engine(worker, EngineConfig(check=True, policy="priority"))
    params = SamplingParams(n=3, seed=1, max_tokens=4)
    low = Request(request_id="low", prompt_token_ids=list(range(10)), params=params, priority=1)
    high = Request(request_id="high", prompt_token_ids=[50, 51, 52], params=params)
    engine.add_request(low)
    engine.step()
    engine.add_request(high)
    news = drain(engine)
    for item in (low, high):
        for index in range(3):
            assert tokens(news[item.request_id, index]) == expect(item, index)
    assert (engine.stats().num_preemptions > 0) == (num_blocks < 20)


def test_forks_that_waited_do_not_score_the_prompt_again() -> None:
    engine = make(max_num_seqs=1)
    item = request("a", 9, n=3, temperature=1.0, seed=2, prompt_logprobs=0, max_tokens=2)
    engine.add_request(item)
    news = drain(engine)
    assert [tokens(news["a", i]) for i in range(3)] == [expect(item, i) for i in range(3)]
    assert engine.worker.num_tokens == 9 + 1 + 2 * (1 + 1)  # type: ignore[attr-defined]
