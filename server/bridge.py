"""Between HTTP and the engine: requests go out, deltas of text come back.

Here: admission, the life of a generation (its requests are aborted the moment nobody listens),
times and counts. Not here: sockets (`fxlm.runtime.client`), text (`fxlm.runtime.outputs`).
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Literal, ParamSpec, Protocol, TypeVar

import msgspec

from fxlm.compiler.errors import EngineDead
from fxlm.runtime.messages import Output, Stats, Taps, TokenLogprob, joined
from fxlm.runtime.outputs import OutputProcessor
from fxlm.runtime.request import Request
from fxlm.runtime.sampling_params import SamplingParams
from fxlm.server.errors import ApiError, engine_dead, unavailable
from fxlm.server.metrics import Metrics, Timing
from fxlm.server.record import Record
from fxlm.server.served import ServedModel
from fxlm.server.texts import TokenTexts

P = ParamSpec("P")
T = TypeVar("T")
Sink = Callable[[Output | Exception], None]

log = logging.getLogger("fxlm.server")
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

    async def ended(self) -> str:
        """Wait until it is gone for good; gives the reason."""
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
        taps: rows of the points that were asked for.
    """

    prompt: int
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[list[TokenLogprob]] | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None
    taps: Taps | None = None

    @classmethod
    def of(cls, parts: "list[Delta]") -> "Delta":
        """Successive news of one completion as one."""
        last = parts[-1]
        if len(parts) == 1:
            return last
        rows = [part.logprobs for part in parts if part.logprobs is not None]
        return cls(
            prompt=last.prompt,
            index=last.index,
            text="".join(part.text for part in parts),
            token_ids=[token for part in parts for token in part.token_ids],
            logprobs=[row for some in rows for row in some] if rows else None,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            taps=reduce(joined, (part.taps for part in parts)),
        )


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
        self.is_logged = False  # the trouble that lasts

    def trouble(self) -> str | None:
        """Why nothing can be generated, or None; the log is told once."""
        reason = self.engine.trouble()
        if reason is not None and not self.is_logged:
            log.error("the engine is not running: %s", reason)
        self.is_logged = reason is not None
        return reason

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
    news: asyncio.Queue[Delta | Exception] = field(default_factory=asyncio.Queue)
    held: list[Delta] = field(default_factory=list)  # for a reader of the whole
    whole: bool = False

    def __post_init__(self) -> None:
        self.num_choices = sum(job.params.n for job in self.jobs)
        self.num_prompt_tokens = sum(len(job.prompt_token_ids) for job in self.jobs)
        self.num_generated_tokens = 0  # of the deltas handed on
        self.runs = [Run(job=job, generation=self, number=i) for i, job in enumerate(self.jobs)]
        self.record.prompt_tokens = self.num_prompt_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that were found in the prefix cache."""
        return sum(run.timing.num_cached for run in self.runs)

    def prompt_logprobs(self, number: int) -> list[list[TokenLogprob]]:
        """Of one prompt: a row for every token from the second on."""
        return self.runs[number].prompt_logprobs

    async def deltas(self, *, whole: bool = False) -> AsyncGenerator[Delta, None]:
        """Start, then yield what comes, until every completion is finished.

        What piles up while the client is slow comes as one delta a completion. Closing it
        earlier aborts what is unfinished.

        Args:
            whole: yield one delta a completion, when all are finished: the reader is not woken
                for every token.

        Raises:
            ApiError: the queue is full, or the engine failed.
        """
        self.whole = whole
        with self.bridge.admitted(self):
            try:
                for run in self.runs:
                    run.start()
                num_unfinished = self.num_choices
                while num_unfinished:
                    for delta in merged([await self.news.get(), *drained(self.news)]):
                        self.num_generated_tokens += len(delta.token_ids)
                        num_unfinished -= delta.finish_reason is not None
                        yield delta
            except EngineDead as error:
                self.bridge.trouble()  # the log gets the whole of it
                raise engine_dead(str(error)) from error
            finally:
                self.close()

    def tell(self, news: Delta | Exception) -> None:
        """Hand news to the reader, or hold it until there is all that the reader wants."""
        if not isinstance(news, Exception):
            self.held.append(news)
            if self.whole and any(run.unfinished for run in self.runs):
                return
        for delta in self.held:
            self.news.put_nowait(delta)
        self.held.clear()
        if isinstance(news, Exception):
            self.news.put_nowait(news)

    def close(self) -> None:
        """Abort what is unfinished and settle the accounts."""
        record = self.record
        for run in self.runs:
            run.close()
            record.finish_reasons += [reason for _, reason in sorted(run.reasons.items())]
        record.cached_tokens = self.num_cached_tokens
        record.generated_tokens = sum(run.timing.num_generated for run in self.runs)
        firsts = [run.timing.first_token for run in self.runs if run.timing.first_token]
        record.first_token = min(firsts, default=None)


def drained(queue: asyncio.Queue[T]) -> Iterator[T]:
    """Everything that is in the queue now."""
    while not queue.empty():
        yield queue.get_nowait()


def merged(news: list[Delta | Exception]) -> Iterator[Delta]:
    """One delta a completion; an exception is raised after what came before it."""
    found: dict[tuple[int, int], list[Delta]] = {}
    failure = None
    for item in news:
        if isinstance(item, Exception):
            failure = item
            break
        found.setdefault((item.prompt, item.index), []).append(item)
    yield from map(Delta.of, found.values())
    if failure is not None:
        raise failure


@dataclass(kw_only=True, eq=False)
class Run:
    """One prompt in the engine. Its outputs become text the moment they arrive, however slowly
    the client reads, so that a stop string ends the work at once."""

    job: Job
    generation: Generation
    number: int
    started: bool = False
    timing: Timing = field(default_factory=Timing)
    reasons: dict[int, str] = field(default_factory=dict)
    prompt_logprobs: list[list[TokenLogprob]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bridge = self.generation.bridge
        self.unfinished = set(range(self.job.params.n))
        self.timing.num_prompt = len(self.job.prompt_token_ids)
        self.request = Request(
            request_id=f"{self.generation.id}-{self.number}",
            prompt_token_ids=self.job.prompt_token_ids,
            params=self.job.params,
            eos_token_ids=list(self.bridge.served.eos_token_ids),
            arrival=self.timing.arrival,
            priority=self.job.priority,
            cache_salt=self.job.cache_salt,
            num_together=len(self.generation.jobs),
        )

    def start(self) -> None:
        """Hand the request to the engine."""
        # Logprobs keep their rows of numbers; only what is shown of them is put into words.
        plain = msgspec.structs.replace(self.job.params, logprobs=None, prompt_logprobs=None)
        self.processor = OutputProcessor(self.bridge.served.tokenizer)
        self.processor.add_request(
            msgspec.structs.replace(self.request, params=plain), kind="delta"
        )
        self.bridge.engine.submit(self.request, self.on_news)
        self.started = True
        self.bridge.metrics.on_submit(self.job.params)

    def close(self) -> None:
        """Abort what is unfinished; tell the metrics once."""
        if not self.started:
            return
        self.started = False
        if self.unfinished:
            self.bridge.engine.abort(self.request.request_id)
        for index in self.unfinished:
            self.reasons.setdefault(index, "abort")
        self.unfinished.clear()
        self.bridge.metrics.on_finish(self.timing, self.reasons.values(), time.monotonic())

    def on_news(self, news: Output | Exception) -> None:
        """Called by the engine's client; nothing is raised into it."""
        found: Delta | Exception | None
        if isinstance(news, Exception):  # the whole request was refused or lost
            found = news
            for index in list(self.unfinished):
                self.end(index, "error")
        else:
            try:
                found = self.on_output(news)
            except Exception as error:
                found = error
        if found is not None:
            self.generation.tell(found)

    def on_output(self, output: Output) -> Delta | None:
        """An output as news; None for a completion that is over already.

        Raises:
            ApiError: the engine gave the request up.
        """
        index = output.index
        if index not in self.unfinished:
            return None
        self.note_times(output)
        if output.finish_reason in ("abort", "error"):
            self.end(index, output.finish_reason)
            message = output.message or "the engine stopped the request"
            raise unavailable(f"The request failed: {message}.", "engine_error")
        if output.prompt_logprobs is not None:
            self.prompt_logprobs, output.prompt_logprobs = output.prompt_logprobs, None
        processed = self.processor.process([output])
        for request_id, aborted in processed.aborts:
            self.bridge.engine.abort(request_id, aborted)
        found = processed.outputs[0].outputs[0]
        assert found.finish_reason in (None, "stop", "length"), found
        if found.finish_reason is not None:
            self.end(index, found.finish_reason)
        rows = output.logprobs
        return Delta(
            prompt=self.number,
            index=index,
            text=found.text,
            token_ids=found.token_ids,
            logprobs=None if rows is None else rows[: len(found.token_ids)],
            finish_reason=found.finish_reason,
            stop_reason=found.stop_reason,
            taps=output.taps,
        )

    def note_times(self, output: Output) -> None:
        """Times and counts of an output."""
        timing = self.timing
        timing.num_cached = max(timing.num_cached, output.num_cached_tokens)
        timing.scheduled = timing.scheduled or output.scheduled
        timing.num_preemptions = max(timing.num_preemptions, output.num_preemptions)
        count = len(output.token_ids)
        self.bridge.metrics.on_tokens(timing, output.index, count, time.monotonic())

    def end(self, index: int, reason: str) -> None:
        """A completion is over."""
        self.unfinished.discard(index)
        self.reasons[index] = reason
