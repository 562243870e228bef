"""Bisect: the pass of the column after which the model says something else, and where.

If the whole column deviates from the captured graph, prefixes of it are run, each time up to the
middle of what is left, in the mode that showed it. Of the first that deviates, the values of nodes
that both graphs have then tell the layer and the node. Not here: the script that shows the fault
alone (`repro`), faults of compiled code (`verify`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxlm.compiler.errors import PassError
from fxlm.compiler.options import CompileOptions
from fxlm.compiler.outline import layer_numbers
from fxlm.compiler.program import module_path
from fxlm.compiler.stages import Snapshot, Stage
from fxlm.models.checkpoint import Checkpoint
from fxlm.runtime.explain import fixtures, subjects
from fxlm.runtime.explain.compare import Errors, Scores, compare
from fxlm.runtime.explain.fixtures import Mode
from fxlm.runtime.explain.subjects import Prompts
from fxlm.runtime.front import front

# A prefix deviates if it is this far from the captured graph: some times the rounding of the
# captured graph in this dtype, and never less than the floor (nats).
TIMES_ROUNDING = 3.0
FLOOR = 1e-3
# Of one value, as a share of its largest element.
NODE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The first value that differs.

    Attributes:
        node: its name; None if only what the graph returns differs.
        layer: number of the layer; -1 outside.
        module: path of the module.
        error: relative to the value's largest element.
        equal: names of values before it that both graphs have and agree on.
    """

    node: str | None
    layer: int
    module: str
    error: float
    equal: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Guilt:
    """What `bisect` found.

    Attributes:
        name: of the pass.
        mode: in which the prompts went through.
        errors: against the captured graph; prompt and position of the largest.
        place: where it begins.
        before, after: the program without and with the pass.
        dtype: in which it shows.
        inputs: values of the placeholders and of ``place.equal``, for a script.
    """

    name: str
    mode: Mode
    errors: Errors
    place: Place
    before: Snapshot
    after: Snapshot
    dtype: str
    inputs: dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One prefix of the column: its last pass, and its largest error against the oracle."""

    name: str
    errors: Errors
    deviates: bool


Tell = Callable[[Line], None]
Made = tuple[Snapshot, Callable[[], Stage]]


class Bisection:
    """One search, in one dtype.

    Args:
        checkpoint, options: as for compiling.
        tolerance: nats of log-probability; None: a multiple of rounding.
        tell: called after each prefix that was run.
        oracle: what the captured graph says in float32, if it is known.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: CompileOptions,
        tolerance: float | None = None,
        tell: Tell = lambda line: None,
        oracle: Scores | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.start = front(checkpoint, options)
        self.facts = self.start.program.facts
        context = self.facts.max_position_embeddings
        self.prompts = fixtures.fixture_prompts(checkpoint, self.facts.vocab_size, context)
        self.oracle = oracle or subjects.reference(checkpoint, options, self.prompts)
        self.tolerance = tolerance
        self.tell = tell

    def run(self) -> Guilt | None:
        """The guilty pass, or None: the whole column first, then halves of it.

        Raises:
            PassError: a pass fails, and none before it is guilty.
        """
        stages, failure = self.stages()
        captured = self.captured(stages[0])
        limit = self.limit(captured)
        found = self.deviation(stages[-1], captured, fixtures.MODES, limit)
        if found is None and failure is not None:
            raise failure
        if found is None:
            return None
        good, bad = 0, len(stages) - 1
        while bad - good > 1:
            middle = (good + bad) // 2
            here = self.deviation(stages[middle], captured, (found[0],), limit)
            if here is None:
                good = middle
            else:
                bad, found = middle, here
        return self.locate(stages[good], stages[bad], *found)

    def stages(self) -> tuple[list[Made], PassError | None]:
        """Each stage up to a pass that fails: a guilty one may leave what another cannot take."""
        found: list[Made] = []
        try:
            found.extend(subjects.stages(self.start, self.checkpoint))
        except PassError as error:
            return found, error
        return found, None

    def captured(self, stage: Made) -> Scores:
        """Scores of the captured graph; in float32 it is the oracle."""
        exact = self.facts.dtype == torch.float32
        scores = self.oracle if exact else self.score(stage[1](), "prefill alone")
        errors = compare(scores, self.oracle)
        self.tell(Line(name=stage[0].name, errors=errors, deviates=False))
        return scores

    def score(self, stage: Stage, mode: Mode) -> Scores:
        """Scores of a stage in one mode."""
        sizes = {"vocab_size": self.facts.vocab_size, "block_size": self.facts.block_size}
        return subjects.score(stage, self.prompts, mode, **sizes)

    def limit(self, captured: Scores) -> float:
        """Nats above which a prefix deviates; set by the captured graph's own rounding."""
        if self.tolerance is not None:
            return self.tolerance
        return max(TIMES_ROUNDING * compare(captured, self.oracle).absolute, FLOOR)

    def deviation(
        self, made: Made, captured: Scores, modes: Sequence[Mode], limit: float
    ) -> tuple[Mode, Errors] | None:
        """The worst mode of a prefix, against the captured graph; None within the limit."""
        snapshot, make = made
        stage = make()
        chosen = modes if stage.paged else ("prefill alone",)
        found = {mode: self.score(stage, mode) for mode in chosen}
        errors = {mode: compare(scores, captured) for mode, scores in found.items()}
        mode = max(errors, key=lambda name: errors[name].absolute)
        deviates = errors[mode].absolute > limit
        exact = compare(found[mode], self.oracle)
        self.tell(Line(name=snapshot.name, errors=exact, deviates=deviates))
        return (mode, errors[mode]) if deviates else None

    def locate(self, before: Made, after: Made, mode: Mode, errors: Errors) -> Guilt:
        """Find the first value that differs, on the prompt with the largest error."""
        prompts = [self.prompts[errors.worst[0]]]
        record = Recorder()
        self.replay(before[1](), prompts, record.keep)  # one stage at a time is in memory
        checker = Checker(after[0], record, NODE_TOLERANCE.get(self.facts.dtype, 1e-4))
        self.replay(after[1](), prompts, checker.check)
        inputs = self.inputs(before[0], prompts) | self.inputs(after[0], prompts)
        place = checker.place()
        inputs |= {n: record.values[n] for n in place.equal}
        return Guilt(
            name=after[0].name, mode=mode, errors=errors, place=place, before=before[0],
            after=after[0], dtype=str(self.facts.dtype).removeprefix("torch."), inputs=inputs,
        )  # fmt: skip

    def replay(self, stage: Stage, prompts: Prompts, watch: Callable[[str, Any], None]) -> None:
        """Prefill one prompt and watch every value."""
        stage(*self.given(stage.cache_specs, stage.steer_size, prompts), watch)

    def given(
        self, specs: Any, steer_size: int, prompts: Prompts
    ) -> tuple[dict[str, torch.Tensor], Any]:
        """Step inputs and empty caches for a prefill."""
        size = self.facts.block_size
        chunks = [fixtures.Chunk(prompt=0, start=0, count=len(prompts[0]))]
        caches = subjects.new_caches(specs, fixtures.num_blocks(prompts, size), size)
        return fixtures.step_inputs(prompts, chunks, size, steer_size), caches

    def inputs(self, snapshot: Snapshot, prompts: Prompts) -> dict[str, torch.Tensor]:
        """Values of a snapshot's placeholders; weights are those of the checkpoint, mapped."""
        program = snapshot.program
        steps, caches = self.given(program.caches, sum(program.steered.values()), prompts)
        bound = snapshot.report is not None
        made = self.checkpoint
        read = made.read if bound else subjects.parameters(self.start, program, made)
        values: dict[str, torch.Tensor] = {}
        for name, spec in program.inputs.items():
            match spec.role:
                case "step":
                    values[name] = steps[spec.source]
                case "cache":
                    values[name] = caches[spec.source, spec.layer]
                case "constant":
                    values[name] = program.constants[spec.source]
                case "weight":
                    values[name] = read(spec.source)
        return values


class Recorder:
    """Keeps the floating-point values of a run by name."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}

    def keep(self, name: str, value: Any) -> None:
        """Called for every node."""
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            self.values[name] = value.clone()


class Checker:
    """Holds the values of a run against recorded ones, up to the first that differs."""

    def __init__(self, snapshot: Snapshot, record: Recorder, tolerance: float) -> None:
        self.snapshot = snapshot
        self.record = record
        self.tolerance = tolerance
        self.equal: set[str] = set()
        self.first: tuple[str, float] | None = None

    def check(self, name: str, value: Any) -> None:
        """Called for every node."""
        exact = self.record.values.get(name)
        if self.first is not None or exact is None or exact.shape != getattr(value, "shape", None):
            return
        error = relative_error(value, exact)
        if error > self.tolerance:
            self.first = (name, error)
        else:
            self.equal.add(name)

    def place(self) -> Place:
        """Where the runs part."""
        if self.first is None:
            return Place(
                node=None, layer=-1, module="", error=float("nan"), equal=frozenset(self.equal)
            )
        name, error = self.first
        layers = layer_numbers(self.snapshot.program.graph)
        node = next(n for n in layers if n.name == name)
        return Place(
            node=name, layer=layers[node], module=module_path(node), error=error,
            equal=frozenset(self.equal),
        )  # fmt: skip


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference as a share of the largest element; infinite for a NaN."""
    if not exact.numel():
        return 0.0
    difference = (value.double() - exact.double()).abs()
    same = (value == exact) | (value.isnan() & exact.isnan())
    difference = torch.where(same, 0.0, difference.nan_to_num(nan=torch.inf, posinf=torch.inf))
    finite = exact.double().abs().nan_to_num(nan=0.0, posinf=0.0)
    return float(difference.max() / finite.max().clamp(min=1e-12))


def bisect(
    checkpoint: Checkpoint,
    options: CompileOptions,
    *,
    tolerance: float | None = None,
    tell: Tell = lambda line: None,
) -> Guilt | None:
    """The guilty pass, sought in the model's dtype and then, finer, in float32.

    Args:
        checkpoint, options: as for compiling.
        tolerance: nats between a prefix and the captured graph; None: a multiple of rounding.
        tell: called after each prefix that was run.
    """
    first = Bisection(checkpoint, options, tolerance, tell)
    guilt = first.run()
    if guilt is not None or first.facts.dtype == torch.float32:
        return guilt
    finer = replace(options, dtype="float32")
    return Bisection(checkpoint, finer, tolerance, tell, first.oracle).run()
