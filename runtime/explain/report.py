"""The report of a column: what each pass did, how right it is, what it costs.

Here: one JSON-able dict from a checkpoint and its options. Not here: the page (`page`), what is
printed (`commands`), the comparison itself (`compare`).
"""

from __future__ import annotations

import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import fxlm
from fxlm.compiler import cost, key, views
from fxlm.compiler.cost import Shape
from fxlm.compiler.errors import InvalidOption
from fxlm.compiler.hoist import hoist
from fxlm.compiler.options import CompileOptions
from fxlm.compiler.pipeline import require_names
from fxlm.compiler.stages import Snapshot, Stage
from fxlm.models.checkpoint import Checkpoint
from fxlm.models.shorten import num_layers, shorten
from fxlm.runtime import machine, probe
from fxlm.runtime.compile import compile_model
from fxlm.runtime.explain import fixtures, subjects, timing
from fxlm.runtime.explain.compare import Errors, Scores, compare
from fxlm.runtime.explain.fixtures import Mode
from fxlm.runtime.front import Front, column_of, front, resolved

SHAPES = (
    Shape(name="decode, 1 sequence", num_seqs=1, num_new=1, context=128),
    Shape(name="decode, 8 sequences", num_seqs=8, num_new=1, context=128),
    Shape(name="prefill, 128 tokens", num_seqs=1, num_new=128, context=128),
)
PREFILL = SHAPES[2]  # that every stage is timed over
DEFAULT_LAYERS = 2  # where memory does not hold the model in float32
VERSION = 1
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """What a report holds.

    Attributes:
        layers: look at the first ones only; None: all, or two where memory is short.
        numbers: run the stages against the oracle.
        times: time steps: ``none``, ``interpreted``, or ``compiled`` (minutes).
        limits: measure what the machine can do.
        shapes: of the steps whose costs and times are told.
        beside: a server runs on this machine: memory is left to its weights, and times are of the
            processor, of one thread, as the process stands still while requests run.
    """

    layers: int | None = None
    numbers: bool = True
    times: str = "interpreted"
    limits: bool = True
    shapes: tuple[Shape, ...] = SHAPES
    beside: bool = False

    @property
    def clock(self) -> probe.Clock:
        """What times are measured with."""
        return time.process_time if self.beside else time.perf_counter


def explain(
    checkpoint: Checkpoint,
    options: CompileOptions,
    choices: Choices,
    *,
    cache_dir: Path | None = None,
    wanted: Sequence[str] = (),
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """Run the column and look at every pass.

    Args:
        checkpoint, options: as for compiling.
        choices: what to look at.
        cache_dir: of artifacts, for compiled times.
        wanted: passes of interest; all are in the report, but these must exist, and are timed.
        tell: called with a line as the work goes on.

    Returns:
        JSON-able values; ``docs/explain.md`` names them. Of one rank's part there are no errors
        and no times: its steps need the other ranks.
    """
    if options.ranks * options.stages > 1:
        part = f"rank {options.rank} of {options.ranks}, stage {options.stage} of {options.stages}"
        tell(f"the part of {part}; errors and times are left out: they need all the ranks")
        choices = replace(choices, numbers=False, times="none")
    with ExitStack() as stack:
        total = num_layers(checkpoint.config)
        count = choices.layers or _affordable(checkpoint, choices)
        left_out = _unaffordable(checkpoint, choices, count)
        if left_out:
            tell(left_out)
            count, choices = 0, replace(choices, numbers=False, times="none")
        if count and count != total:
            place = stack.enter_context(tempfile.TemporaryDirectory())
            checkpoint = shorten(checkpoint, count, Path(place))
        start = front(checkpoint, options)
        require_names(wanted, [item.name for item in start.column])
        maker = _Report(checkpoint, options, choices, start, tell)
        passes = maker.passes()
        if choices.times != "none":
            timed = [p for p in passes[1:] if not wanted or p["name"] in wanted]
            _add_times(timed, checkpoint, options, choices, cache_dir, tell)
        facts = start.program.facts
        return {
            "version": VERSION,
            "fxlm": fxlm.__version__,
            "model": {
                "name": checkpoint.source, "type": facts.model_type,
                "dtype": str(facts.dtype).removeprefix("torch."), "num_layers": total,
                "layers_shown": count or total, "vocab_size": facts.vocab_size,
                "bytes": checkpoint.num_bytes,
            },
            "prompts": [len(p) for p in maker.prompts] if choices.numbers else [],
            "times": choices.times,
            "made": {"date": datetime.now(UTC).isoformat(timespec="seconds"),
                     "beside": choices.beside, "left_out": left_out},
            "machine": _machine(facts.dtype, choices),
            "versions": {"python": platform.python_version(), **key.versions()},
            "shapes": [asdict(shape) for shape in choices.shapes],
            "passes": passes,
        }  # fmt: skip


def _affordable(checkpoint: Checkpoint, choices: Choices) -> int:
    """Layers to look at: 0 for all."""
    if not choices.numbers and choices.times == "none":
        return 0
    fits = _needed_bytes(checkpoint) <= _spare_bytes(checkpoint, choices)
    return 0 if fits else min(DEFAULT_LAYERS, num_layers(checkpoint.config))


def _unaffordable(checkpoint: Checkpoint, choices: Choices, count: int) -> str:
    """Why a server's own memory is in the way even of so many layers; empty if it is not."""
    if not choices.beside or (not choices.numbers and choices.times == "none"):
        return ""
    needed, spare = _needed_bytes(checkpoint, count), _spare_bytes(checkpoint, choices)
    if needed <= spare:
        return ""
    return (f"errors and times are left out: they need {needed / 2**30:.1f} GiB, and "
            f"{spare / 2**30:.1f} GiB may be taken beside a server")  # fmt: skip


def _needed_bytes(checkpoint: Checkpoint, count: int = 0) -> int:
    """Bytes, stored and in float32, of the first ``count`` layers (0: all) and what is outside."""
    total = 0
    for name, info in checkpoint.tensors.items():
        number = re.search(r"\.(\d+)\.", name)
        if number is None or not count or int(number[1]) < count:
            exact = 4 * info.num_bytes // info.torch_dtype.itemsize
            total += exact + info.num_bytes
    return total


def _spare_bytes(checkpoint: Checkpoint, choices: Choices) -> int:
    """Half of the memory that is free; mapped weights of a server count as free, and are not."""
    served = checkpoint.num_bytes if choices.beside else 0
    return max(0, machine.memory_available_bytes() - served) // 2


def _machine(dtype: torch.dtype, choices: Choices) -> dict[str, Any]:
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "architecture": platform.machine()}
    if choices.limits:
        found["read_gbs"] = probe.read_bandwidth_gbs(repeats=3, clock=choices.clock)
        found["matmul_tflops"] = probe.matmul_rate_tflops(dtype, repeats=3, clock=choices.clock)
    return found


class _Report:
    """One walk down the column."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: CompileOptions,
        choices: Choices,
        start: Front,
        tell: Tell,
    ) -> None:
        self.checkpoint = checkpoint
        self.choices = choices
        self.start = start
        self.tell = tell
        facts = start.program.facts
        self.sizes = {"vocab_size": facts.vocab_size, "block_size": facts.block_size}
        context = facts.max_position_embeddings
        self.prompts = fixtures.fixture_prompts(checkpoint, facts.vocab_size, context)
        self.oracle: Scores | None = None
        if choices.numbers:
            tell("the oracle, in float32")
            self.oracle = subjects.reference(checkpoint, options, self.prompts)

    def passes(self) -> list[dict[str, Any]]:
        """One entry a stage, the captured graph first."""
        entries: list[dict[str, Any]] = []
        before: Snapshot | None = None
        scores: dict[Mode, Scores] = {}
        for snapshot, make in subjects.stages(self.start, self.checkpoint):
            self.tell(f"pass {snapshot.name}" if before else "the captured graph")
            entry = _structure(snapshot, before)
            entry["costs"] = _costs(snapshot, self.choices.shapes)
            if self.oracle is not None:
                stage = make()
                found = {m: subjects.score(stage, self.prompts, m, **self.sizes)
                         for m in subjects.modes_of(stage)}  # fmt: skip
                entry["errors"] = dict(self._errors(found, {"prefill alone": self.oracle}))
                entry["errors_before"] = dict(self._errors(found, scores)) if before else {}
                entry["prefill_ms"] = self._prefill(stage)
                scores = found
            entries.append(entry)
            before = snapshot
        return entries

    def _errors(
        self, found: Mapping[Mode, Scores], reference: Mapping[Mode, Scores]
    ) -> Iterator[tuple[Mode, dict[str, Any]]]:
        for mode, scores in found.items():
            against = reference.get(mode, reference["prefill alone"])
            errors: Errors = compare(scores, against)
            yield mode, errors.as_json()

    def _prefill(self, stage: Stage) -> float | None:
        """Milliseconds of the interpreted stage over 128 tokens."""
        if self.choices.times == "none":
            return None
        sizes = (self.sizes["vocab_size"], self.sizes["block_size"])
        call = timing.step_call(stage, PREFILL, *sizes)
        return timing.in_turns({"it": call}, self.choices.clock)["it"]


def _structure(snapshot: Snapshot, before: Snapshot | None) -> dict[str, Any]:
    """What a pass did to the graph."""
    report = snapshot.report
    entry: dict[str, Any] = {
        "name": snapshot.name, "stage": snapshot.program.stage, "summary": snapshot.summary,
        "source": snapshot.source, "layer": None,
        "nodes_after": sum(n.op == "call_function" for n in snapshot.program.graph.nodes),
    }  # fmt: skip
    if report is None or before is None:
        return entry
    picture = views.compared(before.program, snapshot.program)
    return entry | {
        "rewrites": report.rewrites, "seconds": report.seconds, "nodes_before": report.nodes_before,
        "nodes_after": report.nodes_after, "added": report.added, "removed": report.removed,
        "source_digest": report.source_digest, "notes": list(report.notes),
        "layer": {
            "number": picture.layer, "num_changed": picture.num_changed,
            "diff": list(picture.diff), "marks": dict(picture.marks),
            "views": [asdict(view) for view in picture.views.values()],
        },
    }  # fmt: skip


def _costs(snapshot: Snapshot, shapes: Sequence[Shape]) -> list[dict[str, Any]]:
    """Operations and bytes of a step of each shape, and the tokens that the stage runs for it."""
    program = snapshot.program.copy()
    cut = hoist(program)
    rows = []
    for shape in shapes:
        run = cost.shape_run(program, shape)
        counted = cost.summary(cost.step_cost(program, shape, cut))
        rows.append({"shape": shape.name, "tokens": run.num_seqs * run.num_new, **counted})
    return rows


# ---- with and without ------------------------------------------------------------------------

UNCHANGED = "it changed nothing here, so the step without it is the same"


def _add_times(
    passes: list[dict[str, Any]], checkpoint: Checkpoint, options: CompileOptions,
    choices: Choices, cache_dir: Path | None, tell: Tell,
) -> None:  # fmt: skip
    """Time the whole step with every pass, and without each that did something and can go."""
    with tempfile.TemporaryDirectory() as place:
        root = cache_dir if cache_dir is not None and choices.times == "compiled" else Path(place)

        def make(without: str | None) -> subjects.ArtifactSubject:
            disabled = (*options.disabled, *([without] if without else []))
            chosen = replace(options, eager=choices.times != "compiled", disabled=disabled)
            made = compile_model(checkpoint, chosen, cache_dir=root)
            return subjects.ArtifactSubject(made.artifact, checkpoint)

        whole = make(None)
        for entry in passes:
            needed = _needed(entry["name"], checkpoint, options)
            if needed or not entry["rewrites"]:
                entry["without"] = {"required": bool(needed), "reason": needed or UNCHANGED}
                continue
            tell(f"the step without {entry['name']}")
            entry["without"] = {"times": _both(whole, make(entry["name"]), choices)}


def _needed(name: str, checkpoint: Checkpoint, options: CompileOptions) -> str:
    """Why a pass cannot be left out; empty if it can."""
    try:
        chosen, _ = resolved(checkpoint, options)
        column_of(replace(chosen, disabled=(*options.disabled, name)))
    except InvalidOption as error:
        return error.remedy
    return ""


def _both(
    whole: subjects.ArtifactSubject,
    without: subjects.ArtifactSubject,
    choices: Choices,
) -> list[dict[str, Any]]:
    model = whole.artifact.manifest["model"]
    sizes = (model["vocab_size"], model["block_size"])
    rows = []
    for shape in choices.shapes:
        calls = {
            "with": timing.step_call(whole, shape, *sizes),
            "without": timing.step_call(without, shape, *sizes),
        }
        found = timing.in_turns(calls, choices.clock)
        rows.append({"shape": shape.name, "with_ms": found["with"], "without_ms": found["without"]})
    return rows
