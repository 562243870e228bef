"""Whatever comes in, in whatever order: right tokens, no leak, no starvation.

The fake model's tokens are a hash of the prefix found in the cache, and `expect` gives the same
from the request alone, so that each output is compared with the request run alone, whole,
without a cache and without preemption.
"""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fxlm.runtime.engine import Engine, EngineConfig
from fxlm.runtime.request import Request
from fxlm.runtime.sampling_params import SamplingParams
from tests.runtime.fake import VOCAB, FakeDrafter, FakeWorker, expect, spec, speculating

CONTEXT = 40


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    """Prompts that share beginnings often."""
    stem = draw(st.sampled_from([0, 100]))
    length = draw(st.integers(1, 24))
    own = draw(st.integers(0, 6))
    return [(stem + i) % VOCAB for i in range(length)] + [draw(st.integers(0, 255))] * own


@st.composite
def requests(draw: st.DrawFn) -> Request:
    sampled = draw(st.booleans())
    max_tokens = draw(st.integers(1, 12))
    params = SamplingParams(
        temperature=1.0 if sampled else 0.0,
        seed=draw(st.integers(0, 3)) if sampled else None,
        n=draw(st.integers(1, 4)) if sampled else 1,
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        stop_token_ids=draw(st.none() | st.lists(st.integers(0, 255), max_size=60)),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 2])),
        logprobs=draw(st.sampled_from([None, None, 1])),
    )
    return Request(
        request_id="",
        prompt_token_ids=draw(prompts()),
        params=params,
        eos_token_ids=draw(st.lists(st.integers(0, 255), max_size=2)),
        cache_salt=draw(st.sampled_from(["", "", "tenant"])),
        priority=draw(st.integers(0, 2)),
    )


sizes = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(4, 30),
        "block_size": st.sampled_from([1, 2, 4]),
        "max_num_batched_tokens": st.integers(1, 20),
        "max_num_seqs": st.integers(1, 5),
        "max_score_rows": st.integers(1, 8),
        "max_drafts": st.integers(0, 4),
    }
)
depths = st.integers(1, 3)


def worker_of(sizes: dict[str, int], depth: int) -> FakeWorker:
    """Steps fly only where nothing is drafted."""
    return FakeWorker(
        spec(max_model_len=CONTEXT, **sizes), depth=1 if sizes["max_drafts"] else depth
    )


def make(worker: FakeWorker, caching: bool) -> Engine:
    """With drafts, right and wrong ones, if the worker verifies."""
    config = EngineConfig(check=True, enable_prefix_caching=caching, policy="priority")
    if not worker.spec.max_drafts:
        return Engine(worker, config)
    return speculating(worker, FakeDrafter(lambda prefix: sum(prefix) % 4 == 0), config)


class EngineMachine(RuleBasedStateMachine):
    """Requests come, steps run, clients leave."""

    @initialize(sizes=sizes, caching=st.booleans(), depth=depths)
    def start(self, sizes: dict[str, int], caching: bool, depth: int) -> None:
        self.worker = worker_of(sizes, depth)
        self.engine = make(self.worker, caching)
        self.requests: dict[str, Request] = {}
        self.got: dict[tuple[str, int], list[int]] = {}
        self.ended: dict[tuple[str, int], str] = {}

    @rule(request=requests())
    def submit(self, request: Request) -> None:
        named = Request(**{**_fields(request), "request_id": str(len(self.requests))})
        self.engine.add_request(named)
        self.requests[named.request_id] = named
        for index in range(named.params.n):
            self.got[named.request_id, index] = []

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            for output in self.engine.step():
                key = output.request_id, output.index
                assert key not in self.ended, "an output after the end"
                self.got[key] += output.token_ids
                if output.finish_reason:
                    self.ended[key] = output.finish_reason

    @rule(number=st.integers(0, 30))
    def abort(self, number: int) -> None:
        self.engine.abort(str(number))
        scheduler = self.engine.scheduler
        assert not any(s.request.request_id == str(number) for s in scheduler.running)

    @rule(number=st.integers(0, 30), index=st.integers(0, 3))
    def abort_one(self, number: int, index: int) -> None:
        self.engine.abort(str(number), index)

    @invariant()
    def books(self) -> None:
        self.engine.scheduler.check()

    def teardown(self) -> None:
        for _ in range(3000):
            if not self.engine.has_unfinished():
                break
            self.step(1)
        assert self.ended.keys() == self.got.keys(), "starved"
        assert self.engine.scheduler.pool.num_used == 0
        assert not self.engine.scheduler.running
        capacity = self.engine.scheduler.pool.num_usable * self.worker.spec.block_size
        for (name, index), tokens in self.got.items():
            request, reason = self.requests[name], self.ended[name, index]
            wanted = expect(request, index, CONTEXT)
            if reason in ("abort", "error"):
                assert tokens == wanted[: len(tokens)]
            else:
                assert tokens == wanted
            if reason == "error":
                assert len(request.prompt_token_ids) + len(wanted) - 1 > capacity


EngineMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestEngine = EngineMachine.TestCase


@settings(max_examples=60, deadline=None)
@given(
    wanted=st.lists(requests(), min_size=1, max_size=10), sizes=sizes, depth=depths, data=st.data()
)
def test_every_request_finishes_in_bounded_steps(
    wanted: list[Request], sizes: dict[str, int], depth: int, data: st.DataObject
) -> None:
    """Each step runs at least one token, and a token runs again only after a preemption."""
    worker = worker_of(sizes, depth)
    engine = make(worker, caching=True)
    total = 0
    for number, request in enumerate(wanted):
        engine.add_request(Request(**{**_fields(request), "request_id": str(number)}))
        total += request.params.n * CONTEXT
        for _ in range(data.draw(st.integers(0, 3))):
            engine.step()
    while engine.has_unfinished():
        engine.step()
        bound = total + engine.stats().num_preemptions * CONTEXT + len(wanted)
        assert worker.num_steps <= bound, "no progress"
    assert engine.stats().num_preemptions <= total * len(wanted)


def _fields(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in request.__struct_fields__}
