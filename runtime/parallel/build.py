"""An engine over several ranks, built in the process of rank 0.

Here: the order of the start (plan, load, meet) and the worker that rank 0's engine runs. Not
here: the other ranks (``rank``), watching them (``ranks``).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from fxlm.compiler.errors import EngineDead, InvalidOption, PeersLost
from fxlm.models.facts import num_heads, num_layers
from fxlm.runtime.batch import Batch
from fxlm.runtime.compile import Compilation, Prefix, Report, compile_for, open_for
from fxlm.runtime.engine import Engine, EngineConfig
from fxlm.runtime.memory import MemoryPlan
from fxlm.runtime.options import EngineOptions
from fxlm.runtime.parallel.choice import choose_backend
from fxlm.runtime.parallel.member import Member, share_cores
from fxlm.runtime.parallel.messages import (
    Copy,
    Find,
    Join,
    Joined,
    Load,
    Loaded,
    Planned,
    merged_spec,
    spec_of,
    spec_values,
)
from fxlm.runtime.parallel.place import place_of
from fxlm.runtime.parallel.ranks import Ranks
from fxlm.runtime.parallel.start import Started, start_processes
from fxlm.runtime.step import Done, Pending, StepResult, WorkerSpec


class ParallelWorker:
    """Runs each step on all ranks; with several stages, as many steps at once."""

    def __init__(self, member: Member, ranks: Ranks) -> None:
        self.member = member
        self.ranks = ranks
        self.depth = member.place.stages
        self.num_flying = 0

    @property
    def spec(self) -> WorkerSpec:
        """Sizes that every rank has."""
        return self.member.worker.spec

    @property
    def tier(self) -> str:
        """What runs the steps of rank 0, and of the others alike."""
        return self.member.worker.tier

    def launch(self, batch: Batch) -> Pending:
        """Let every rank run the step that ``batch`` holds; returns when rank 0 has run its part.

        Raises:
            EngineDead: a rank was lost; says which and why.
        """
        tensors, wants = batch.tensors(), batch.wants_logprobs
        with self._explained(1 if self.depth > 1 else 0):
            self.ranks.send_step(tensors)
            values = self.member.run(tensors)
            if self.depth == 1:
                return Done(self.member.worker.result(values, wants))
        return Flight(self, batch.sizes.rows, wants)

    def land(self, rows: int, wants_logprobs: bool) -> StepResult:
        """The result of the oldest step in flight.

        Raises:
            EngineDead: as for `launch`.
        """
        with self._explained(-1):
            return self.member.worker.result(self.member.drawn(rows), wants_logprobs)

    @contextmanager
    def _explained(self, flying: int) -> Iterator[None]:
        """Within, ranks are busy; ``flying`` is how many more steps are in flight behind it."""
        self.ranks.set_busy(True)
        try:
            yield
        except PeersLost as error:
            raise EngineDead(self.ranks.explain(str(error))) from error
        finally:
            self.num_flying += flying
            self.ranks.set_busy(self.num_flying > 0)

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy blocks on every rank."""
        self.ranks.send(Copy(copies))
        self.member.worker.copy_blocks(copies)


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that is somewhere between the stages."""

    worker: ParallelWorker
    rows: int
    wants_logprobs: bool

    def result(self) -> StepResult:
        """Wait for the last stage."""
        return self.worker.land(self.rows, self.wants_logprobs)


def build_parallel(
    options: EngineOptions, report: Report | None = None
) -> tuple[Engine, MemoryPlan, Compilation]:
    """As `fxlm.runtime.worker.build_engine`, over several ranks."""
    place = place_of(options)
    refuse_ranks(options)
    started_ranks = start_ranks(options, place.size)
    ranks = started_ranks.ranks
    share_cores(options, started_ranks.local_ranks)
    try:
        made = compile_ranks(options, place.size, report)
        ranks.meet()
        ranks.send(Find())
        member = Member(options, place, started_ranks.local_ranks)
        plan = member.plan(made[0])
        started = time.perf_counter()
        planned = ranks.collect(Planned)
        ranks.pids = {p.rank: p.pid for p in planned}
        sizes = merged_spec([spec_values(plan.spec), *(p.spec for p in planned)])
        ranks.send(Load(sizes))
        member.load(spec_of(sizes))
        ranks.collect(Loaded)
        ranks.send(Join())
        member.join(started_ranks.store, started_ranks.host)
        ranks.collect(Joined)
        ranks.start_pulse()
    except BaseException:
        started_ranks.close()
        raise
    if report is not None:
        report(f"load weights, {place.size} ranks", time.perf_counter() - started)
    worker = ParallelWorker(member, ranks)
    config = EngineConfig(
        enable_prefix_caching=options.enable_prefix_caching,
        policy=options.scheduling_policy,
        seed=options.seed,
    )
    engine = Engine(worker, config, alarm=ranks)
    weakref.finalize(engine, started_ranks.close)
    return engine, replace(plan, spec=worker.spec), made[0]


def refuse_ranks(options: EngineOptions) -> None:
    """Refuse ranks that the model cannot be cut into, before there is a process for each.

    Raises:
        InvalidOption: says how many layers or heads there are.
    """
    config = open_for(options).config
    stages, layers = options.pipeline_parallel_size, num_layers(config)
    if layers is not None and stages > layers:
        reason = f"{layers} layers cannot be cut into {stages} stages; use {layers} or less"
        raise InvalidOption("pipeline_parallel_size", stages, reason)
    ranks, heads = options.tensor_parallel_size, num_heads(config)
    if heads is not None and heads % ranks:
        reason = f"{heads} query heads cannot be shared out evenly; use a divisor of {heads}"
        raise InvalidOption("tensor_parallel_size", ranks, reason)


def start_ranks(options: EngineOptions, size: int) -> Started:
    """Start every rank but 0, or meet those that are there.

    Raises:
        InvalidOption: whoever is to start them cannot.
        SystemExit: this process was one of the other ranks, and is done.
    """
    silence_s = float(options.distributed_timeout_seconds)
    match choose_backend(options)[0]:
        case "mp":
            return start_processes(options, size, silence_s)
        case "external_launcher":
            from fxlm.runtime.parallel.torchrun import start_torchrun

            return start_torchrun(options, size, silence_s)
        case "ray":
            from fxlm.runtime.parallel.actors import start_actors

            return start_actors(options, size, silence_s)


def compile_ranks(
    options: EngineOptions, size: int, report: Report | None = None
) -> list[Compilation]:
    """Find or make the artifacts of all ranks; the model is captured at most once."""
    prefix = Prefix()
    return [
        compile_for(options, rank=rank, report=report if rank == 0 else None, prefix=prefix)
        for rank in range(size)
    ]
