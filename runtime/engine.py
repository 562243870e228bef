"""The engine: requests in, tokens out, one step at a time.

Here: `Engine`. Not here: text (``outputs``), processes (``service``), who runs next
(``scheduler``), the model (``worker``).

A step is `plan`, `launch`, `commit`. They are apart so that further steps can be planned and
launched before the tokens of the last one are read: as many as the worker is deep.
"""

import random
import secrets
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fxlm.compiler.errors import EngineDead, InvalidRequest, OutOfMemory
from fxlm.runtime.batch import Batch
from fxlm.runtime.interrupts import unbroken
from fxlm.runtime.messages import (
    ITERATION_BUCKETS,
    EngineInfo,
    FinishReason,
    Output,
    Stats,
    TokenLogprob,
)
from fxlm.runtime.points import Points
from fxlm.runtime.request import Request
from fxlm.runtime.scheduler import Chunk, Plan, Policy, Scheduler
from fxlm.runtime.sequence import Sequence, Status
from fxlm.runtime.speculator import Speculator
from fxlm.runtime.step import Alarm, Pending, StepResult, Worker


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Options of the engine.

    Args:
        enable_prefix_caching: reuse the blocks of equal prefixes.
        policy: "fcfs", or "priority" (of the request, lower first; then first come first served).
        seed: makes the seeds of requests without one repeatable; None draws them at random.
        check: assert the scheduler's books after every step (tests).
    """

    enable_prefix_caching: bool = True
    policy: Policy = "fcfs"
    seed: int | None = None
    check: bool = False


@dataclass(slots=True)
class _Live:
    """A request with completions that are not finished."""

    request: Request
    sequences: list[Sequence]
    unfinished: set[int] = field(default_factory=set)


class Engine:
    """Continuous batching over one worker. Not thread-safe.

    Args:
        worker: runs the steps.
        config: options.
        speculator: drafts tokens, if the worker's graph verifies them.
        alarm: tells of a worker that is lost between two steps.
    """

    def __init__(
        self,
        worker: Worker,
        config: EngineConfig | None = None,
        speculator: Speculator | None = None,
        alarm: Alarm | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        self.worker = worker
        self.spec = worker.spec
        self.speculator = speculator
        self.alarm = alarm
        assert speculator is None or self.spec.max_drafts, "the graph verifies nothing"
        self.batch = Batch(self.spec)
        self.points = Points(self.spec)
        self.scheduler = Scheduler(
            self.spec,
            enable_prefix_caching=self.config.enable_prefix_caching,
            policy=self.config.policy,
            depth=worker.depth,
        )
        self._flying: deque[tuple[Plan, Pending]] = deque()  # launched, the oldest first
        self.dead: str | None = None
        self._live: dict[str, _Live] = {}
        self._outputs: list[Output] = []  # made outside of a step: aborts
        self._num_requests = 0
        self._random = random.Random(self.config.seed) if self.config.seed is not None else None
        self._stats = Stats(
            iteration_tokens=[0] * (len(ITERATION_BUCKETS) + 1),
            accepted_per_position=[0] * self.spec.max_drafts,
        )

    # --- requests

    def add_request(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequest: a field of it is wrong; nothing was queued.
            EngineDead: an earlier step failed beyond repair.
        """
        if self.trouble() is not None:
            raise EngineDead(self.dead)
        request.verify(self.spec.vocab_size, self.spec.max_model_len)
        request = self.points.admit(request)
        if request.request_id in self._live:
            raise InvalidRequest(f"request id {request.request_id!r} is in use", "request_id")
        sequence = Sequence(
            request,
            order=self._num_requests,
            seed=self._seed(request.params.seed),
            max_model_len=self.spec.max_model_len,
        )
        self.scheduler.add(sequence)
        self._num_requests += 1
        unfinished = set(range(request.params.n))
        self._live[request.request_id] = _Live(request, [sequence], unfinished)

    def _seed(self, seed: int | None) -> int:
        if seed is not None:
            return seed
        return self._random.getrandbits(63) if self._random else secrets.randbits(63)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Stop a request, or one completion of it; its blocks are free when this returns.

        An unknown or finished one is ignored. What was unfinished reports ``finish_reason``
        "abort" with the next step.
        """
        self._outputs += self._end(request_id, "abort", "", index)

    def _end(
        self, request_id: str, reason: FinishReason, message: str, index: int | None = None
    ) -> list[Output]:
        """Finish what is unfinished of a request; gives what its client is to hear."""
        live = self._live.get(request_id)
        if live is None:
            return []
        indices = [i for i in sorted(live.unfinished) if index is None or i == index]
        known = {sequence.index: sequence for sequence in live.sequences}
        outputs = []
        for i in indices:
            sequence = known.get(i)  # None: a fork not split off yet
            if index is not None and (sequence is None or sequence.num_forks):
                continue  # its prompt still serves the others: it goes on, unheard
            outputs.append(Output(request_id=request_id, index=i, message=message))
            self._finish(live, i, sequence, outputs[-1], reason)
        return outputs

    def _finish(
        self, live: _Live, index: int, sequence: Sequence | None, output: Output, why: FinishReason
    ) -> None:
        """Close one completion: blocks, books and the last fields of its output."""
        live.unfinished.discard(index)
        output.finish_reason = why
        output.num_prompt_tokens = len(live.request.prompt_token_ids)
        if sequence is not None:
            output.num_preemptions = sequence.num_preemptions
            output.num_cached_tokens = max(sequence.num_cached, 0)
            output.scheduled = sequence.scheduled
            if self.speculator is not None:
                self.speculator.finish(sequence)
            if sequence.status is not Status.FINISHED:
                self.scheduler.remove(sequence)
        finished = self._stats.finished
        finished[why] = finished.get(why, 0) + 1
        if not live.unfinished:
            del self._live[live.request.request_id]

    def trouble(self) -> str | None:
        """Why it cannot go on; None if it can."""
        if self.dead is None and self.alarm is not None:
            self.dead = self.alarm.trouble()
        return self.dead

    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self._live or self._outputs or self._flying)

    @property
    def num_unfinished(self) -> int:
        """Requests not finished."""
        return len(self._live)

    # --- steps

    def step(self) -> list[Output]:
        """Launch what can be, and commit one step; gives the news of its sequences.

        Ctrl-C is put off until its end; the engine can go on then.

        Raises:
            EngineDead: the worker failed; `fail_all` tells what to tell the requests.
        """
        if self.trouble() is not None:
            raise EngineDead(self.dead)
        with unbroken():  # what it has to tell is told by the next step if Ctrl-C came
            self._step(self._outputs)
        outputs, self._outputs = self._outputs, []
        return outputs

    def _step(self, outputs: list[Output]) -> None:
        while self._live and len(self._flying) < self.worker.depth:
            plan = self.plan()
            outputs += self._fail(plan)
            if not plan.num_tokens:
                idle = plan.failed or plan.num_preempted or self._flying or not self._live
                assert idle, "nothing can run"
                break
            with self._whole(plan, outputs):
                self._flying.append((plan, self.launch(plan)))
        if self._flying:
            plan, pending = self._flying[0]
            with self._whole(plan, outputs):
                result = pending.result()
                self._flying.popleft()
                self.commit(plan, result, outputs)
                if self.speculator is not None:
                    self.speculator.stop(plan)
        if self.config.check:
            self.scheduler.check()

    @contextmanager
    def _whole(self, plan: Plan, outputs: list[Output]) -> Iterator[None]:
        """Whatever happens within, no sequence of the plan is left half stepped."""
        try:
            yield
        except OutOfMemory as error:
            outputs += self._lose(plan, str(error))
        except Exception as error:
            lost = isinstance(error, EngineDead)
            self.dead = str(error) if lost else f"{type(error).__name__}: {error}"
            raise EngineDead(self.dead) from error

    def plan(self) -> Plan:
        """Decide what the next step runs; forks join the live sequences here."""
        if self.speculator is not None:
            self.speculator.draft(self.scheduler)
        plan = self.scheduler.schedule()
        self._stats.num_preemptions += plan.num_preempted
        for fork in plan.forks:
            self._live[fork.request.request_id].sequences.append(fork)
        return plan

    def launch(self, plan: Plan) -> Pending:
        """Let the worker run a plan."""
        self.batch.fill(plan)
        self.batch.points = self.points.fill(plan)
        if plan.copies:
            self.worker.copy_blocks(plan.copies)
        self._fly(plan, True)
        return self.worker.launch(self.batch)

    def _fly(self, plan: Plan, flying: bool) -> None:
        """Note which sequences no other plan may hold; with one plan at a time, nobody asks."""
        if self.worker.depth > 1:
            for sequence in plan.sequences():
                sequence.flying = flying

    def commit(self, plan: Plan, result: StepResult, outputs: list[Output]) -> None:
        """Append the tokens of a step, index full blocks, finish what ended.

        What was aborted while the step flew is passed over.
        """
        self._count(plan.num_tokens)
        self._fly(plan, False)
        block_size = self.spec.block_size
        accepted = result.num_accepted
        row = 0
        for group, sequence in enumerate(plan.decodes):
            if sequence.status is Status.FINISHED:
                row += 1 + len(sequence.drafts)
                continue
            count = 1 if accepted is None else accepted[group]
            output = self._append(sequence, row, count, result)
            added = len(output.token_ids)
            if sequence.params.taps:
                self.points.keep(sequence, result, row, added)
                self.points.give(sequence, output)
            sequence.num_computed += added
            end = sequence.num_computed
            if end % block_size < added:  # a block is full
                self.scheduler.commit_blocks(sequence, end - added, end)
            row += 1
            if sequence.drafts:
                row += len(sequence.drafts)
                self._settle_drafts(sequence, count - 1)
            if output.finish_reason is not None:
                self._close(sequence, output)
            outputs.append(output)
        token = row
        for chunk in plan.chunks:
            if chunk.sequence.params.taps:
                self.points.keep(chunk.sequence, result, token, chunk.num_tokens)
            row = self._commit_chunk(chunk, row, result, outputs)
            token += chunk.num_tokens
        assert max(row, 1) == len(result.token_ids), (row, len(result.token_ids))

    def _commit_chunk(
        self, chunk: Chunk, row: int, result: StepResult, outputs: list[Output]
    ) -> int:
        """Gives the first row of the next chunk."""
        sequence = chunk.sequence
        if sequence.status is not Status.FINISHED:
            sequence.num_computed += chunk.num_tokens
            self.scheduler.commit_blocks(sequence, chunk.start, sequence.num_computed)
        if chunk.num_scores:
            columns = sequence.params.prompt_logprobs or 0
            for score in range(row, row + chunk.num_scores):
                sequence.prompt_logprobs.append(_logprobs(result, score, columns))
            sequence.num_scored += chunk.num_scores
            row += chunk.num_scores
        for draw in chunk.draws:
            if draw.status is Status.FINISHED:
                row += 1
                continue
            output = self._append(draw, row, 1, result)
            if draw.params.taps:
                self.points.give(draw, output)
            if output.finish_reason is not None:
                self._close(draw, output)
            outputs.append(output)
            row += 1
        return row

    def _append(self, sequence: Sequence, row: int, count: int, result: StepResult) -> Output:
        """Give a sequence the tokens of ``count`` rows, up to one that ends it."""
        tokens = result.token_ids[row : row + count]
        output = Output(
            request_id=sequence.request.request_id, index=sequence.index, token_ids=tokens
        )
        before = len(sequence.token_ids)
        stops = sequence.stop_ids
        ends = tokens[0] in stops if count == 1 else not stops.keys().isdisjoint(tokens)
        if ends or before + count >= sequence.max_total:
            self._end_at(sequence, output)
        sequence.token_ids += tokens
        if sequence.wants_logprobs:
            columns = sequence.params.logprobs or 0
            output.logprobs = [_logprobs(result, row + i, columns) for i in range(len(tokens))]
        if before == sequence.num_prompt:
            self._first(sequence, output)
        self._stats.generation_tokens += len(tokens)
        return output

    def _end_at(self, sequence: Sequence, output: Output) -> None:
        """Find the first of the new tokens that ends the sequence; drop those behind it."""
        for total, token in enumerate(output.token_ids, len(sequence.token_ids) + 1):
            if token in sequence.stop_ids and total > sequence.min_total:
                output.stop_reason = sequence.stop_ids[token]
                output.finish_reason = "stop"
            elif total >= sequence.max_total:
                output.finish_reason = "length"
            if output.finish_reason is not None:
                del output.token_ids[total - len(sequence.token_ids) :]
                return

    def _first(self, sequence: Sequence, output: Output) -> None:
        """What only the first output of a completion tells."""
        output.num_prompt_tokens = sequence.num_prompt
        output.num_cached_tokens = max(sequence.num_cached, 0)
        output.scheduled = sequence.scheduled
        if sequence.index == 0:
            self._stats.prompt_tokens += sequence.num_prompt
            if sequence.params.prompt_logprobs is not None:
                output.prompt_logprobs = sequence.prompt_logprobs
                sequence.prompt_logprobs = []

    def _close(self, sequence: Sequence, output: Output) -> None:
        """Finish a completion; its output says why."""
        assert output.finish_reason is not None, output
        live = self._live[sequence.request.request_id]
        self._finish(live, sequence.index, sequence, output, output.finish_reason)

    # --- failures

    def _fail(self, plan: Plan) -> list[Output]:
        """Tell the sequences that can never go on; the other completions of a request do."""
        outputs = []
        for sequence, message in plan.failed:
            if sequence.num_forks:  # its completions were not split off: none can ever be
                outputs += self._end(sequence.request.request_id, "error", message)
            else:
                output = Output(request_id=sequence.request.request_id, index=sequence.index)
                output.message = message
                output.finish_reason = "error"
                self._close(sequence, output)
                outputs.append(output)
        return outputs

    def _lose(self, plan: Plan, message: str) -> list[Output]:
        """End every request that had a part in a step that was not finished."""
        outputs = []
        for request_id in {s.request.request_id: None for s in plan.sequences()}:
            outputs += self._end(request_id, "error", message)
        return outputs

    def fail_all(self, message: str) -> list[Output]:
        """End every request with an error; gives what their clients are to hear."""
        outputs, self._outputs = self._outputs, []
        for request_id in list(self._live):
            outputs += self._end(request_id, "error", message)
        return outputs

    def abort_all(self) -> None:
        """Abort every request (the engine is told to leave)."""
        for request_id in list(self._live):
            self.abort(request_id)

    # --- numbers

    def _count(self, num_tokens: int) -> None:
        stats = self._stats
        stats.num_steps += 1
        stats.iteration_tokens_sum += num_tokens
        stats.iteration_tokens[bisect_left(ITERATION_BUCKETS, num_tokens)] += 1

    def _settle_drafts(self, sequence: Sequence, num_accepted: int) -> None:
        """Count what was right; the blocks of what was not go back."""
        if self.speculator is not None:
            self.speculator.note(sequence, num_accepted)
        stats = self._stats
        stats.num_drafts += 1
        stats.num_draft_tokens += len(sequence.drafts)
        stats.num_accepted_tokens += num_accepted
        for position in range(num_accepted):
            stats.accepted_per_position[position] += 1
        sequence.drafts = []
        self.scheduler.trim(sequence)

    def started(
        self, seconds: dict[str, float], artifact: str, passes: dict[str, tuple[int, float]]
    ) -> None:
        """Note how the start went, for `stats`.

        Args:
            seconds: by phase.
            artifact: what the cache had; see `Stats`.
            passes: rewrites and seconds of each, by name.
        """
        self._stats.startup = seconds
        self._stats.artifact = artifact
        self._stats.passes = passes

    def weights_are(self, state: str) -> None:
        """Note what is known of mapped weights; see `Stats`. From any thread."""
        self._stats.weights = state

    def stats(self) -> Stats:
        """Numbers of this moment and totals; the object is reused by the next call."""
        stats, scheduler = self._stats, self.scheduler
        stats.tier = self.worker.tier
        stats.num_running = len(scheduler.running)
        stats.num_waiting = scheduler.num_waiting
        stats.kv_cache_usage = scheduler.pool.usage
        stats.prefix_queries = scheduler.prefix_queries
        stats.prefix_hits = scheduler.prefix_hits
        return stats

    def info(self) -> EngineInfo:
        """What a client must know."""
        spec = self.spec
        return EngineInfo(
            vocab_size=spec.vocab_size,
            max_model_len=spec.max_model_len,
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=spec.max_num_batched_tokens,
            num_blocks=spec.num_blocks,
            block_size=spec.block_size,
        )


def _logprobs(result: StepResult, row: int, columns: int) -> list[TokenLogprob]:
    """The row's token and its rank, then the ``columns`` most likely tokens."""
    assert result.logprobs is not None, "log-probabilities were asked for and not returned"
    assert result.logprob_ids is not None
    assert result.ranks is not None
    ids = result.logprob_ids[row, : columns + 1].tolist()
    values = result.logprobs[row, : columns + 1].tolist()
    ranks = [int(result.ranks[row]), *range(1, columns + 1)]
    return list(zip(ids, values, ranks, strict=True))
