"""Between HTTP and the engine: requests go out, deltas of text come back.

Here: admission, the life of a generation (its requests are aborted the moment nobody listens),
times and counts. Not here: sockets (`fxlm.runtime.client`), text (`fxlm.runtime.outputs`).
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, ParamSpec, Protocol, TypeVar

from fxlm.compiler.errors import EngineDead
from fxlm.runtime.messages import Output, Stats, TokenLogprob
from fxlm.runtime.request import Request
from fxlm.runtime.sampling_params import SamplingParams
from fxlm.server.errors import ApiError, unavailable
from fxlm.server.metrics import Metrics, Timing
from fxlm.server.record import Record
from fxlm.server.served import ServedModel
from fxlm.server.texts import TokenTexts

P = ParamSpec("P")
T = TypeVar("T")
Sink = Callable[[Output | Exception], None]

LONG_TEXT = 4096  # characters from which tokenizing leaves the event loop
_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="fxlm-text")


async def off_loop(size: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`work(...)`, on another thread when it has `size` >= `LONG_TEXT` characters to chew."""
    if size < LONG_TEXT:
        return work(*args, **kwargs)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_threads, lambda: work(*args, **kwargs))


class Engine(Protocol):
    """What the server asks of an engine; every call is made on the event loop."""

    @property
    def stats(self) -> Stats:
        """The latest numbers that the engine sent."""
        ...

    def trouble(self) -> str | None:
        """Why it cannot serve (dead, silent for too long), or None."""
        ...

    def submit(self, request: Request, sink: Sink) -> None:
        """Start a request; `sink` gets its outputs, or one exception that ends it.

        Raises:
            EngineDead: it is gone.
        """
        ...

    def abort(self, request_id: str, index: int = -1) -> None:
        """Stop one completion or all (-1); what is unknown or finished is ignored."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One prompt and how to go on from it."""

    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""


@dataclass(kw_only=True, slots=True)
class Delta:
    """News of one completion.

    Args:
        prompt: which prompt, 0.. .
        index: which completion of it, 0..n-1.
        text: new text; may be empty (half a character, a possible stop string).
        token_ids: the new tokens.
        logprobs: a row for each of them: the drawn token first, then the top ones.
        finish_reason: None while it goes on.
        stop_reason: the stop string or stop token that ended it.
    """

    prompt: int
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[list[TokenLogprob]] | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None


class Bridge:
    """The one way from the handlers to the engine.

    Args:
        engine: started.
        served: the model.
        metrics: told of every token.
        max_queued: completions that may wait beyond ``served.max_num_seqs``.
    """

    def __init__(
        self, engine: Engine, served: ServedModel, metrics: Metrics, max_queued: int
    ) -> None:
        self.engine = engine
        self.served = served
        self.metrics = metrics
        self.capacity = served.max_num_seqs + max_queued
        self.texts = TokenTexts(served.tokenizer)
        self.live: set[Generation] = set()
        self.num_live = 0  # completions in the engine

    def trouble(self) -> str | None:
        """Why nothing can be generated, or None."""
        return self.engine.trouble()

    def generation(self, jobs: list[Job], record: Record) -> "Generation":
        """A generation; nothing is sent before its deltas are asked for."""
        return Generation(bridge=self, jobs=jobs, record=record)

    @contextmanager
    def admitted(self, generation: "Generation") -> Iterator[None]:
        """Count the completions of `generation` while they run; 503 when the queue is full."""
        if self.num_live + generation.num_choices > self.capacity:
            self.metrics.rejections.inc()
            message = (
                f"{self.num_live} completions run or wait and {self.capacity} are allowed; "
                f"this request has {generation.num_choices}. Try again later."
            )
            raise unavailable(message, "queue_full")
        self.num_live += generation.num_choices
        self.live.add(generation)
        try:
            yield
        finally:
            self.num_live -= generation.num_choices
            self.live.discard(generation)

    def end_all(self, error: ApiError) -> None:
        """End every generation with `error` (the time to shut down is up)."""
        for generation in list(self.live):
            generation.news.put_nowait(error)


@dataclass(kw_only=True, eq=False)
class Generation:
    """The prompts of one HTTP request in the engine, and what came back so far."""

    bridge: Bridge
    jobs: list[Job]
    record: Record
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    news: asyncio.Queue[Output | Exception] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self.num_choices = sum(job.params.n for job in self.jobs)
        self.num_prompt_tokens = sum(len(job.prompt_token_ids) for job in self.jobs)
        self.num_generated_tokens = 0
        self.prompt_logprobs: list[list[list[TokenLogprob]] | None] = [None] * len(self.jobs)
        self.runs = [Run(job=job, generation=self, number=i) for i, job in enumerate(self.jobs)]
        self.record.prompt_tokens = self.num_prompt_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that were found in the prefix cache."""
        return sum(run.timing.num_cached for run in self.runs)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Start, then yield what comes, until every completion is finished.

        Closing it earlier aborts what is unfinished.

        Raises:
            ApiError: the queue is full, or the engine failed.
        """
        with self.bridge.admitted(self):
            runs = {run.request_id: run for run in self.runs}
            try:
                for run in self.runs:
                    self.bridge.engine.submit(run.request(), self.news.put_nowait)
                    run.started = True
                    self.bridge.metrics.on_submit(run.job.params)
                while any(run.unfinished for run in self.runs):
                    news = await self.news.get()
                    if isinstance(news, Exception):
                        raise news
                    delta = runs[news.request_id].on_output(news)
                    if delta is not None:
                        yield delta
            except EngineDead as error:
                raise unavailable(f"The engine stopped: {error}", "engine_dead", 10) from error
            finally:
                self.close()

    def close(self) -> None:
        """Abort what is unfinished and settle the accounts."""
        for run in self.runs:
            run.close()
        self.record.cached_tokens = self.num_cached_tokens
        self.record.generated_tokens = self.num_generated_tokens
        for run in self.runs:
            self.record.finish_reasons += run.reasons.values()
        firsts = [run.timing.first_token for run in self.runs if run.timing.first_token]
        self.record.first_token = min(firsts, default=None)


@dataclass(kw_only=True, eq=False)
class Run:
    """One prompt in the engine."""

    job: Job
    generation: Generation
    number: int
    started: bool = False
    timing: Timing = field(default_factory=Timing)
    reasons: dict[int, str] = field(default_factory=dict)
    writers: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.request_id = f"{self.generation.id}-{self.number}"
        self.timing.num_prompt = len(self.job.prompt_token_ids)
        self.unfinished = set(range(self.job.params.n))
        self.bridge = self.generation.bridge

    def request(self) -> Request:
        """What the engine gets."""
        return Request(
            request_id=self.request_id,
            prompt_token_ids=self.job.prompt_token_ids,
            params=self.job.params,
            eos_token_ids=list(self.bridge.served.eos_token_ids),
            arrival=self.timing.arrival,
            priority=self.job.priority,
            cache_salt=self.job.cache_salt,
        )

    def close(self) -> None:
        """Abort what is unfinished; tell the metrics once."""
        if not self.started:
            return
        self.started = False
        if self.unfinished:
            self.bridge.engine.abort(self.request_id)
        for index in sorted(self.unfinished):
            self.reasons.setdefault(index, "abort")
        self.unfinished.clear()
        self.bridge.metrics.on_finish(self.timing, self.reasons.values(), time.monotonic())

    def on_output(self, output: Output) -> Delta | None:
        """An output of the engine as news; None for a completion that is over already.

        Raises:
            ApiError: the engine gave the request up.
        """
        index = output.index
        if index not in self.unfinished:
            return None
        timing = self.timing
        timing.num_cached = max(timing.num_cached, output.num_cached_tokens)
        timing.scheduled = timing.scheduled or output.scheduled
        timing.num_preemptions = max(timing.num_preemptions, output.num_preemptions)
        if output.finish_reason in ("abort", "error"):
            self.unfinished.discard(index)
            self.reasons[index] = output.finish_reason
            message = output.message or "the engine stopped the request"
            raise unavailable(f"The request failed: {message}.", "engine_error")
        count = len(output.token_ids)
        self.bridge.metrics.on_tokens(timing, index, count, time.monotonic())
        self.generation.num_generated_tokens += count
        if output.prompt_logprobs is not None:
            self.generation.prompt_logprobs[self.number] = output.prompt_logprobs
        return self.delta(output)

    def delta(self, output: Output) -> Delta:
        """The text of an output; a stop string found in it ends the completion here and there."""
        index = output.index
        writer = self.writers.setdefault(index, Interim(self.bridge.served, self.job.params))
        text, stop = writer.push(
            output.token_ids, output.finish_reason is not None, output.stop_reason
        )
        finish = output.finish_reason
        reason = output.stop_reason
        if stop is not None:
            if finish is None:
                self.bridge.engine.abort(self.request_id, index)
            finish, reason = "stop", stop
        if finish is not None:
            self.unfinished.discard(index)
            self.reasons[index] = finish
        return Delta(
            prompt=self.number,
            index=index,
            text=text,
            token_ids=output.token_ids,
            logprobs=output.logprobs,
            finish_reason=finish,
            stop_reason=reason,
        )


class Interim:
    def __init__(self, served, params):
        self.t, self.p, self.ids, self.sent = served.tokenizer, params, [], 0

    def push(self, ids, last, stop_token):
        self.ids += ids
        use = self.ids[:-1] if last and stop_token is not None else self.ids
        text = self.t.decode(use)
        for s in self.p.stop_strings:
            at = text.find(s)
            if at >= 0:
                end = at + (len(s) if self.p.include_stop_str_in_output else 0)
                out = text[self.sent : end]
                self.sent = end
                return out, s
        end = len(text)
        if not last:
            hold = max([len(s) for s in self.p.stop_strings] + [1]) - 1
            end -= hold
            while text[:end].endswith("\ufffd"):
                end -= 1
        end = max(end, self.sent)
        out = text[self.sent : end]
        self.sent = end
        return out, None
