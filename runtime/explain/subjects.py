"""What can be run on the fixtures: the oracle, the stages of a column, a compiled artifact.

The oracle is the captured graph in float32, before any pass. Not here: prompts and steps
(`fixtures`), the comparison (`compare`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from fxlm.compiler.artifact import Artifact
from fxlm.compiler.options import CompileOptions
from fxlm.compiler.program import CacheSpec, Facts, Program
from fxlm.compiler.stages import Caches, Snapshot, Stage, walk
from fxlm.compiler.step import Reader, Step, load_weights
from fxlm.models.checkpoint import Checkpoint
from fxlm.runtime.explain import fixtures
from fxlm.runtime.explain.compare import Scores, from_logits, from_samples, joined
from fxlm.runtime.explain.fixtures import Mode
from fxlm.runtime.front import Front, front

Prompts = Sequence[Sequence[int]]
Weights = dict[str, torch.Tensor]
Run = Callable[[dict[str, torch.Tensor]], list[torch.Tensor]]


class Subject(Protocol):
    """Something that runs steps."""

    paged: bool
    sampled: bool
    cache_specs: list[CacheSpec]
    steer_size: int

    def bind(self, caches: Caches) -> Run:
        """Steps over these caches."""
        ...


class ArtifactSubject:
    """An artifact with its weights, as a subject.

    Args:
        artifact: opened.
        checkpoint: tensors are read from it.
        eager: interpret the regions even if packages are there.
        weights: prepared already; None: they are prepared from the checkpoint.
    """

    paged = True
    sampled = True

    def __init__(
        self,
        artifact: Artifact,
        checkpoint: Reader,
        eager: bool = False,
        weights: Weights | None = None,
    ) -> None:
        self.artifact = artifact
        self.eager = eager
        self.cache_specs = artifact.caches()
        self.steer_size = sum(size for _, size in artifact.manifest["steered"])
        if weights is None:
            with torch.inference_mode():
                weights = load_weights(artifact, checkpoint, torch.device("cpu"))
        self.weights = weights

    def bind(self, caches: Caches) -> Run:
        """Steps over these caches."""
        step = Step(self.artifact, self.weights, caches, self.eager)

        def run(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
            with torch.inference_mode():
                return step(inputs)

        return run


def new_caches(specs: Sequence[CacheSpec], num_blocks: int, block_size: int) -> Caches:
    """Empty KV memory of every layer."""
    made = {}
    for layer, spec in enumerate(specs):
        for name, dim in (("k", spec.key_dim), ("v", spec.value_dim)):
            shape = (num_blocks, spec.num_kv_heads, block_size, dim)
            made[name, layer] = torch.zeros(shape, dtype=spec.dtype)
    return made


def score(
    subject: Subject, prompts: Prompts, mode: Mode, *, vocab_size: int, block_size: int
) -> Scores:
    """Run the prompts in one mode. A subject without a cache knows ``prefill alone`` only."""
    assert subject.paged or mode == "prefill alone", mode
    parts: list[Scores] = []
    run = -1
    for number, chunks in fixtures.steps(prompts, mode):
        if number != run:
            blocks = fixtures.num_blocks(prompts, block_size)
            step = subject.bind(new_caches(subject.cache_specs, blocks, block_size))
            run = number
        inputs = fixtures.step_inputs(prompts, chunks, block_size, subject.steer_size)
        outputs = step(inputs)
        rows = fixtures.rows_of(chunks)
        if all(fixtures.is_scored(mode, chunk) for chunk in chunks):
            sampled = subject.sampled
            parts.append(from_samples(rows, outputs, vocab_size) if sampled
                         else from_logits(rows, outputs[0]))  # fmt: skip
    return joined(parts)


def modes_of(subject: Subject) -> tuple[Mode, ...]:
    """The modes in which a subject can run."""
    return fixtures.MODES if subject.paged else ("prefill alone",)


def reference(checkpoint: Checkpoint, options: CompileOptions, prompts: Prompts) -> Scores:
    """What the oracle says of every token of the prompts.

    Raises:
        UnsupportedModel: the model does not capture in float32.
    """
    start = front(checkpoint, replace(options, dtype="float32"))
    read = parameters(start, start.program, checkpoint, torch.float32)
    oracle = Stage(start.program, read)
    facts = start.program.facts
    return score(
        oracle, prompts, "prefill alone",
        vocab_size=facts.vocab_size, block_size=facts.block_size,
    )  # fmt: skip


def parameters(
    start: Front, captured: Program, checkpoint: Checkpoint, dtype: torch.dtype | None = None
) -> Callable[[str], torch.Tensor]:
    """Parameters by qualified name, made from the checkpoint by transformers' own rules.

    Args:
        captured: program of the first stage; ``start.program`` is none once passes ran.
        dtype: of floating-point parameters; None leaves them as the rules gave them.
    """
    made = start.binding.convert({name: checkpoint.read(name) for name in start.binding.names})
    wanted = {captured.inputs[n.name].source: n.meta["val"].dtype for n in captured.placeholders()}

    def read(name: str) -> torch.Tensor:
        value = made[name]
        floating = value.is_floating_point()
        return value.to(dtype) if dtype is not None and floating else value.to(wanted[name])

    return read


def stages(start: Front, checkpoint: Checkpoint) -> Iterator[tuple[Snapshot, Callable[[], Stage]]]:
    """Each stage of the column with what makes it runnable; hold one at a time."""

    def make(snapshot: Snapshot) -> Stage:
        bound = snapshot.report is not None
        program = snapshot.program
        read = checkpoint.read if bound else parameters(start, program, checkpoint)
        return Stage(snapshot.program, read)

    for snapshot in walk(start.program, start.column):
        yield snapshot, lambda snapshot=snapshot: make(snapshot)  # type: ignore[misc]


def facts_of(start: Front) -> Facts:
    """Facts of the captured program."""
    return start.program.facts
