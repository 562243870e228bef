"""Verify: a compiled step against the float32 oracle, and the stamp of the artifact.

Each fixture prompt goes through by prefill and by decode, alone and batched. Not here: which
pass is at fault (`bisect`), tokens of whole generations against transformers (`check`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from fxlm.compiler.artifact import Artifact
from fxlm.compiler.stages import Stage
from fxlm.models.checkpoint import Checkpoint
from fxlm.runtime.compile import Compilation, Report, compile_for
from fxlm.runtime.explain import fixtures, stamp, subjects
from fxlm.runtime.explain.compare import Errors, Scores, compare
from fxlm.runtime.explain.fixtures import Mode
from fxlm.runtime.front import front
from fxlm.runtime.options import EngineOptions, compile_options
from fxlm.runtime.worker import load_prepared

# The same measure as `fxlm check`: twice the rounding of the model itself, at least this (nats).
TIMES_ROUNDING = 2.0
FLOOR = 0.05


def verify(
    options: EngineOptions, *, tolerance: float | None = None, report: Report | None = None
) -> tuple[stamp.Stamp, Compilation]:
    """Compile or find the artifact of these options, measure its errors, and stamp it.

    Args:
        options: of the engine.
        tolerance: nats of log-probability; None: by the rounding of the captured graph.
        report: see `fxlm.runtime.compile.compile_model`.
    """
    made = compile_for(options, report=report)
    checkpoint, artifact = made.checkpoint, made.artifact
    model = artifact.manifest["model"]
    prompts = fixtures.fixture_prompts(
        checkpoint, model["vocab_size"], model["max_position_embeddings"]
    )
    oracle = subjects.reference(checkpoint, compile_options(options), prompts)
    weights, _ = load_prepared(made, options)  # those that are served
    found = errors_of(artifact, checkpoint, prompts, oracle, weights)
    rounding = rounding_of(options, checkpoint, prompts, oracle)
    if tolerance is None:
        tolerance = max(TIMES_ROUNDING * rounding, FLOOR)
    result = stamp.Stamp(
        manifest=stamp.manifest_digest(artifact),
        weights=checkpoint.weights_digest(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        dtype=model["dtype"],
        errors={mode: errors.as_json() for mode, errors in found.items()},
        rounding=rounding,
        tolerance=tolerance,
        passed=max(errors.absolute for errors in found.values()) <= tolerance,
    )
    stamp.write(artifact, result)
    return result, made


def errors_of(
    artifact: Artifact,
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    oracle: Scores,
    weights: subjects.Weights | None = None,
) -> dict[Mode, Errors]:
    """Errors of an artifact in every mode."""
    found = scores_of(artifact, checkpoint, prompts, weights)
    return {mode: compare(scores, oracle) for mode, scores in found.items()}


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


def rounding_of(
    options: EngineOptions,
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    oracle: Scores,
) -> float:
    """Error of the captured graph in the model's dtype, before any pass, in nats."""
    start = front(checkpoint, compile_options(options))
    captured = Stage(start.program, subjects.parameters(start, start.program, checkpoint))
    facts = start.program.facts
    sizes = {"vocab_size": facts.vocab_size, "block_size": facts.block_size}
    scores = subjects.score(captured, prompts, "prefill alone", **sizes)
    return compare(scores, oracle).absolute
