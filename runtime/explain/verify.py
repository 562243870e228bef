"""Verify: a compiled step against the float32 oracle, and the stamp of the artifact.

Each fixture prompt goes through by prefill and by decode, alone and batched. How wrong the compiled
step may be is set by rounding: the errors that the captured graph itself has in the model's dtype
on the same rows, times a factor. A fault of some percent in one layer hides in those, so the column
is run in float32, too, where a thousandth of a nat is a fault; only where weights, activations or
the cache are rounded on purpose that would say nothing, and is left out. Not here: which pass is at
fault (`bisect`), tokens of whole generations against transformers (`check`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from fxlm.compiler.artifact import Artifact
from fxlm.compiler.options import CompileOptions
from fxlm.compiler.pipeline import run
from fxlm.compiler.stages import Stage
from fxlm.models.checkpoint import Checkpoint
from fxlm.models.formats import quantization_of
from fxlm.runtime.compile import Compilation, Report, compile_for
from fxlm.runtime.explain import fixtures, stamp, subjects
from fxlm.runtime.explain.compare import Errors, Scores, chosen_rows, compare
from fxlm.runtime.explain.fixtures import Mode
from fxlm.runtime.front import front
from fxlm.runtime.options import EngineOptions, compile_options
from fxlm.runtime.worker import load_prepared

TIMES_ROUNDING = 2.0  # of the largest and of the typical error (the first as in `fxlm check`)
LARGEST_FLOOR, TYPICAL_FLOOR = 0.05, 0.01  # nats; less is no fault in half precision
EXACT = 1e-3  # nats; in float32 this much is one


def verify(
    options: EngineOptions, *, tolerance: float | None = None, report: Report | None = None
) -> tuple[stamp.Stamp, Compilation]:
    """Compile or find the artifact of these options, measure its errors, and stamp it.

    Args:
        options: of the engine.
        tolerance: nats of the largest error of a log-probability, and nothing else is held then;
            None: by rounding, and the column in float32 is held, too.
        report: see `fxlm.runtime.compile.compile_model`.

    Raises:
        InvalidOption: the artifact cannot be written, so no stamp can be put there.
    """
    made = compile_for(options, report=report)
    checkpoint, artifact = made.checkpoint, made.artifact
    stamp.require_writable(artifact)
    model, choices = artifact.manifest["model"], compile_options(options)
    prompts = fixtures.fixture_prompts(
        checkpoint, model["vocab_size"], model["max_position_embeddings"]
    )
    oracle = subjects.reference(checkpoint, choices, prompts)
    weights, _ = load_prepared(made, options)  # those that are served
    found = scores_of(artifact, checkpoint, prompts, weights)
    del weights
    errors = {mode: compare(scores, oracle) for mode, scores in found.items()}
    captured = captured_scores(checkpoint, choices, prompts)
    rounding = {m: compare(chosen_rows(captured, s.rows), oracle) for m, s in found.items()}
    limits = limits_of(rounding, model["dtype"], tolerance)
    column = None
    if tolerance is None and model["dtype"] != "float32" and not rounds(choices, checkpoint):
        exact = column_scores(checkpoint, replace(choices, dtype="float32"), prompts)
        column = max(compare(scores, oracle).absolute for scores in exact.values())
    result = stamp.Stamp(
        manifest=stamp.manifest_digest(artifact),
        weights=checkpoint.weights_digest(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        dtype=model["dtype"],
        errors={mode: found.as_json() for mode, found in errors.items()},
        rounding=max(found.absolute for found in rounding.values()),
        tolerance=limits[0],
        typical_tolerance=limits[1],
        column=column,
        faults=list(faults_of(errors, limits, column)),
    )
    stamp.write(artifact, result)
    return result, made


def limits_of(
    rounding: Mapping[Mode, Errors], dtype: str, tolerance: float | None
) -> tuple[float, float]:
    """Nats that the largest and the typical error may have, by those of the captured graph."""
    if tolerance is not None:
        return tolerance, float("inf")
    floors = (EXACT, EXACT) if dtype == "float32" else (LARGEST_FLOOR, TYPICAL_FLOOR)
    largest = max(found.absolute for found in rounding.values())
    typical = max(found.typical for found in rounding.values())
    return max(TIMES_ROUNDING * largest, floors[0]), max(TIMES_ROUNDING * typical, floors[1])


def faults_of(
    errors: Mapping[Mode, Errors], limits: tuple[float, float], column: float | None
) -> Iterator[str]:
    """What is above its limit, in words."""
    for mode, found in errors.items():
        if found.absolute > limits[0]:
            yield f"{mode}: {found.absolute:.2g} nats, at most {limits[0]:.2g}"
        if found.typical > limits[1]:
            yield f"{mode}: typically {found.typical:.2g} nats, at most {limits[1]:.2g}"
    if column is not None and column > EXACT:
        yield f"the passes change the model: {column:.2g} nats in float32, at most {EXACT:g}"


def rounds(options: CompileOptions, checkpoint: Checkpoint) -> bool:
    """Whether something is rounded on purpose that the captured graph does not round."""
    cached = options.kv_cache_dtype != "auto"
    return cached or options.quantization is not None or quantization_of(checkpoint) is not None


def scores_of(
    artifact: Artifact,
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    weights: subjects.Weights | None = None,
) -> dict[Mode, Scores]:
    """What an artifact says of the prompts in every mode.

    Args:
        weights: those that are served; None: prepared from the checkpoint.
    """
    subject = subjects.ArtifactSubject(artifact, checkpoint, weights=weights)
    model = artifact.manifest["model"]
    sizes = {"vocab_size": model["vocab_size"], "block_size": model["block_size"]}
    return {mode: subjects.score(subject, prompts, mode, **sizes) for mode in fixtures.MODES}


def captured_scores(
    checkpoint: Checkpoint, options: CompileOptions, prompts: Sequence[Sequence[int]]
) -> Scores:
    """What the captured graph says in the model's dtype, before any pass."""
    start = front(checkpoint, options)
    captured = Stage(start.program, subjects.parameters(start, start.program, checkpoint))
    facts = start.program.facts
    sizes = {"vocab_size": facts.vocab_size, "block_size": facts.block_size}
    return subjects.score(captured, prompts, "prefill alone", **sizes)


def column_scores(
    checkpoint: Checkpoint, options: CompileOptions, prompts: Sequence[Sequence[int]]
) -> dict[Mode, Scores]:
    """What the graph behind all passes says in every mode, interpreted."""
    start = front(checkpoint, options)
    stage = Stage(run(start.program, start.column), checkpoint.read)
    facts = start.program.facts
    sizes = {"vocab_size": facts.vocab_size, "block_size": facts.block_size}
    return {mode: subjects.score(stage, prompts, mode, **sizes) for mode in fixtures.MODES}
