"""Compile a model: checkpoint -> program -> passes -> regions -> artifact, cached by key.

This is where the rooms meet: `models` gives the module and its weights' names, `passes` the
column, `compiler` everything else. Not here: memory and running (`plan`, `worker`).
"""

from __future__ import annotations

import gc
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fxlm.compiler import artifact as artifacts
from fxlm.compiler import key as keys
from fxlm.compiler.artifact import Artifact, dtype_name
from fxlm.compiler.cache import cache_directory, file_digest
from fxlm.compiler.errors import InvalidOption
from fxlm.compiler.options import CompileOptions
from fxlm.compiler.outline import Outline, Region
from fxlm.compiler.program import Program, received
from fxlm.models.checkpoint import Checkpoint, open_checkpoint
from fxlm.runtime import machine
from fxlm.runtime.cache import (
    Miss,
    Target,
    eager,
    look_up,
    open_frozen,
    target_of,
)
from fxlm.runtime.front import column_of, front, resolved
from fxlm.runtime.options import EngineOptions, compile_options, from_mapping

_log = logging.getLogger(__name__)

Report = Callable[[str, float], None]
OnGraph = Callable[[Artifact], None]

PARTING = ("shard", "cut_stages")  # from the first of these on, the ranks' programs differ
# What an artifact's directory holds, and nothing else.
PARTS = {
    artifacts.MANIFEST,
    "verified.json",
    "load.json",
    "constants.safetensors",
    "regions",
    "model",
}
# What the tokenizer, the template and the defaults of a request need.
MODEL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "tokenizer.model",
    "vocab.json", "merges.txt", "vocab.txt",
)  # fmt: skip


@dataclass(kw_only=True)
class Compilation:
    """Result of `compile_model`.

    Attributes:
        artifact: opened and checked.
        checkpoint: what it was made from, open.
        miss: why it was made now; None if it was there already.
        seconds: of each stage, by name.
        program: the final program, if it was compiled now.
    """

    artifact: Artifact
    checkpoint: Checkpoint
    miss: Miss | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    program: Program | None = None

    @property
    def cached(self) -> bool:
        """Whether it was there already."""
        return self.miss is None


def compile_model(
    checkpoint: Checkpoint,
    options: CompileOptions,
    *,
    cache_dir: Path | None = None,
    output: Path | None = None,
    report: Report | None = None,
    on_graph: OnGraph | None = None,
    prefix: Prefix | None = None,
) -> Compilation:
    """Find or make the artifact of a checkpoint.

    Args:
        checkpoint: opened.
        options: see `CompileOptions`.
        cache_dir: see `cache_directory`.
        output: put the artifact here instead of into the cache.
        report: called with (stage, seconds) as each stage ends.
        on_graph: called with an artifact of the same graphs, uncompiled, before they are compiled.
        prefix: given to the compilations of all ranks of a model, it is captured once.

    Raises:
        UnsupportedModel, PassError, InvalidOption: the model or the passes are at fault.
    """
    root = cache_directory(cache_dir)
    target = target_of(checkpoint, options, root, output)
    if output is not None:
        _refuse_foreign(target.path)
    with artifacts.locked(target.path):
        found = look_up(target)
        if isinstance(found, Artifact):
            return Compilation(artifact=found, checkpoint=checkpoint)
        _log.info("compiling: %s", found.text)
        option = "--cache-dir" if output is None else "--output"
        _require_writable(target.path.parent, option, found.text)
        if target.path.is_dir():  # it is moved away
            _require_writable(target.path, option, found.text)
        with _no_collection():
            run = _Compiler(checkpoint, target, root / "regions", report, on_graph, prefix)
            return replace(run.run(), miss=found)


def compile_for(
    options: EngineOptions,
    *,
    rank: int = 0,
    output: Path | None = None,
    report: Report | None = None,
    on_graph: OnGraph | None = None,
    prefix: Prefix | None = None,
) -> Compilation:
    """Open the checkpoint that an engine's options name, and find or make its artifact.

    Args:
        options: of the engine.
        rank: of the artifact, where several ranks share the model.
        output, report, on_graph, prefix: see `compile_model`.

    Raises:
        ArtifactError: the artifact that ``options.frozen`` names cannot serve.
    """
    checkpoint, root = open_for(options), cache_directory(options.cache_dir)
    chosen = compile_options(options, rank)
    if options.frozen is not None:
        artifact = open_frozen(Path(options.frozen), target_of(checkpoint, chosen, root))
        return Compilation(artifact=artifact, checkpoint=checkpoint)
    return compile_model(
        checkpoint, chosen, cache_dir=root, output=output, report=report, on_graph=on_graph,
        prefix=prefix,
    )  # fmt: skip


def open_for(options: EngineOptions) -> Checkpoint:
    """The checkpoint that an engine's options name."""
    return open_checkpoint(options.model, options.revision, options.trust_remote_code)


def compile(model: str, *, output: str | Path | None = None, **options: Any) -> Artifact:
    """Compile a model, or find its artifact in the cache.

    Args:
        model: directory, hub id, ``bundled`` or ``bundled-draft``.
        output: directory for the artifact instead of the cache.
        options: of `fxlm.runtime.options.EngineOptions`, e.g. ``dtype`` and ``passes``.

    Returns:
        The artifact, opened and checked.
    """
    place = Path(output) if output is not None else None
    return compile_for(from_mapping({**options, "model": model}), output=place).artifact


def _refuse_foreign(path: Path) -> None:
    """An output directory is replaced whole, so it must be new, empty, or an artifact."""
    try:
        if path.is_dir():
            names = {item.name for item in path.iterdir()}
            if not names or (names <= PARTS and artifacts.is_manifest(path / artifacts.MANIFEST)):
                return
            raise InvalidOption("--output", str(path), "it holds other files; name a new directory")
        if path.exists() or not path.parent.is_dir():
            raise InvalidOption("--output", str(path), "name a directory in one that exists")
    except OSError as error:
        reason = f"{(error.strerror or str(error)).lower()}; name a directory that can be read"
        raise InvalidOption("--output", str(path), reason) from error


@contextmanager
def _no_collection() -> Iterator[None]:
    """Looking for cycles among a million nodes of graphs takes a tenth of a compilation."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _require_writable(directory: Path, option: str, why: str) -> None:
    """Tell before minutes of work that there is nowhere to put its result, and why it is needed."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        reason = f"{(error.strerror or str(error)).lower()}, and the model must be compiled ({why})"
        reason += "; name a directory that can be written"
        raise InvalidOption(option, str(directory), reason) from error


def _digest_file(package: Path) -> Path:
    return package.with_suffix(".sha256")


def _is_whole(package: Path) -> bool:
    """Whether a pooled package is there, and is what was once put there."""
    try:
        return _digest_file(package).read_text() == file_digest(package)
    except OSError:
        return False


@dataclass(slots=True)
class Prefix:
    """What the compilations of a model's ranks have in common: the program before it is cut."""

    program: Program | None = None


class _Compiler:
    """One run from checkpoint to artifact, with the time of each stage."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        target: Target,
        pool: Path,
        report: Report | None,
        on_graph: OnGraph | None,
        prefix: Prefix | None,
    ) -> None:
        self.checkpoint = checkpoint
        self.target = target
        self.options = target.options
        self.pool = pool
        self.report = report
        self.on_graph = on_graph
        self.prefix = prefix or Prefix()
        self.seconds: dict[str, float] = {}
        self.wait: Callable[[], None] = lambda: None  # for regions that are compiled ahead

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        if self.report is not None:
            self.report(name, self.seconds[name])

    def run(self) -> Compilation:
        with ExitStack() as self.ahead:
            return self.whole()

    def start_ahead(self) -> None:
        """Have the regions of the first layers compiled meanwhile, where that pays."""
        from fxlm.runtime.ahead import first_layers, forked

        if count := first_layers(self.checkpoint, self.options):
            self.wait = self.ahead.enter_context(forked(lambda: self.compile_first(count)))

    def compile_first(self, count: int) -> None:
        """Compile the regions of the first ``count`` layers into the pool."""
        from fxlm.runtime.ahead import outline_first

        plan = outline_first(self.checkpoint, self.options, count)
        if plan is not None and (missing := self.missing(plan)):
            self.compile(missing, alone=True)

    def whole(self) -> Compilation:
        program = self.program()
        from fxlm.compiler.hoist import hoist
        from fxlm.compiler.outline import outline

        with self.stage("hoist and outline"):
            cut = hoist(program)
            plan = outline(cut.step)
        if self.on_graph is not None and not self.options.eager:
            self.on_graph(self.uncompiled(program, cut, plan))
        self.write(self.target, program, cut, plan)
        return Compilation(
            artifact=artifacts.open_artifact(self.target.path),
            checkpoint=self.checkpoint,
            seconds=self.seconds,
            program=program,
        )

    def uncompiled(self, program: Program, cut: Any, plan: Any) -> Artifact:
        """The artifact of the same graphs under ``--enforce-eager``, found or written."""
        target = eager(self.target)
        with artifacts.locked(target.path):
            found = look_up(target)
            if not isinstance(found, Artifact):
                self.write(target, program, cut, plan)
        return found if isinstance(found, Artifact) else artifacts.open_artifact(target.path)

    def write(self, target: Target, program: Program, cut: Any, plan: Any) -> None:
        """Write an artifact, compiled as its options say."""
        with artifacts.writing(target.path) as work:
            _write_graphs(work, program, cut, plan)
            if not target.options.eager:
                self.lower(work, plan)
            with self.stage("write"):
                _copy_model_files(self.checkpoint.path, work / "model")
                artifacts.write_manifest(work, self.manifest(target, program, cut, plan))

    def program(self) -> Program:
        """Capture and run the column; once for all ranks as far as they have it in common."""
        from fxlm.compiler.pipeline import run

        column = column_of(resolved(self.checkpoint, self.options)[0])
        names = [item.name for item in column]
        shared = min((names.index(n) for n in PARTING if n in names), default=len(names))
        if self.prefix.program is None:
            start = front(self.checkpoint, self.options, self.stage, self.start_ahead)
            with self.stage("passes"):
                self.prefix.program = run(start.program, start.column[:shared])
        if shared == len(names):
            return self.prefix.program
        with self.stage("passes of the rank"):
            return run(self.prefix.program.copy(), column[shared:])

    def lower(self, work: Path, plan: Any) -> None:
        """Compile each region, or take it from the pool of regions compiled before."""
        pooled = self.pooled(plan)
        if missing := self.missing(plan):
            with self.stage(f"compile {', '.join(r.name for r in missing.values())}"):
                gc.collect()  # what capture and passes left; others compile meanwhile
                self.wait()
                if left := self.missing(plan):
                    self.compile(left)
        for name, path in pooled.items():
            shutil.copyfile(path, work / "regions" / f"{name}.pt2")

    def compile(self, regions: dict[Path, Region], *, alone: bool = False) -> None:
        """Compile regions into the pool; ``alone`` in a process that does nothing else."""
        from fxlm.compiler.lower import lower

        lower(regions, self.pool, machine.num_cores()[0], alone=alone)
        for path in regions:
            _digest_file(path).write_text(file_digest(path))

    def missing(self, plan: Outline) -> dict[Path, Region]:
        """The regions that the pool lacks, by where they belong."""
        pooled = self.pooled(plan)
        return {pooled[r.name]: r for r in plan.regions if not _is_whole(pooled[r.name])}

    def pooled(self, plan: Outline) -> dict[str, Path]:
        """Where the pool has the package of each region, by its name."""
        from fxlm.compiler.lower import recipe

        self.pool.mkdir(parents=True, exist_ok=True)
        same = {k: self.target.factors[k] for k in ("versions", "device")}
        # A package depends on the graph, not on the passes that made it.
        identities = {r.name: [r.digest, same, recipe()] for r in plan.regions}
        return {n: self.pool / f"{keys.digest(i)[:32]}.pt2" for n, i in identities.items()}

    def manifest(self, target: Target, program: Program, cut: Any, plan: Any) -> dict[str, Any]:
        from fxlm.compiler.liveness import activation_costs
        from fxlm.compiler.ops.collectives import sent_per_step

        weights = {
            node.name: _tensor_spec(node.meta["val"])
            for node in cut.step.nodes
            if node.op == "placeholder" and cut.step_inputs[node.name].role == "weight"
        }
        facts = program.facts
        return {
            "key": target.key,
            "factors": target.factors,
            "compiled": not target.options.eager,
            "model": {
                "model_type": facts.model_type, "vocab_size": facts.vocab_size,
                "max_position_embeddings": facts.max_position_embeddings,
                "num_layers": facts.num_layers, "dtype": dtype_name(facts.dtype),
                "device": facts.device.type, "block_size": facts.block_size,
                "max_logprobs": facts.max_logprobs, "max_tokens": program.max_tokens,
            },
            "taps": _taps(program),
            "steered": [[path, size] for path, size in program.steered.items()],
            "checkpoint": self.checkpoint.digest(),
            "weights": {name: weights[name] for name in cut.prepared},
            "activations": activation_costs(program, plan),
            "communication": sent_per_step(program, self.options.ranks),
            "caches": [
                {"num_kv_heads": c.num_kv_heads, "key_dim": c.key_dim, "value_dim": c.value_dim,
                 "dtype": dtype_name(c.dtype)} for c in program.caches
            ],
            "received": received(program, self.options.ranks),
            "step_inputs": [
                [n, s.role, s.source, s.layer] for n, s in cut.step_inputs.items()
            ],
            "regions": {r.name: r.digest for r in plan.regions},
            "calls": [
                {"region": c.region, "inputs": c.inputs, "outputs": c.outputs} for c in plan.calls
            ],
            "results": plan.results,
            "passes": [_pass_line(report) for report in program.log],
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }  # fmt: skip


def _tensor_spec(value: torch.Tensor) -> dict[str, Any]:
    return {
        "dtype": dtype_name(value.dtype),
        "shape": [int(s) for s in value.shape],
        "stride": [int(s) for s in value.stride()],
    }


def _taps(program: Program) -> list[list[Any]]:
    """Name and shape of a token's row of each tap, in the order of the step's last results."""
    returned: Any = program.output().args[0]
    values = [n.meta["val"] for n in returned[len(returned) - len(program.taps) :]]
    rows = [[int(size) for size in value.shape[1:]] for value in values]
    return [[name, row] for name, row in zip(program.taps, rows, strict=True)]


def _pass_line(report: Any) -> dict[str, Any]:
    return {
        "name": report.name, "rewrites": report.rewrites, "source": report.source_digest,
        "nodes_before": report.nodes_before, "nodes_after": report.nodes_after,
        "seconds": round(report.seconds, 4), "added": report.added, "removed": report.removed,
        "notes": list(report.notes),
    }  # fmt: skip


def _write_graphs(work: Path, program: Program, cut: Any, plan: Any) -> None:
    import json

    from safetensors.torch import save

    from fxlm.compiler import graph_json

    inputs = {name: _load_input(spec) for name, spec in cut.load_inputs.items()}
    content = {"inputs": inputs, "graph": graph_json.dump(cut.load)}
    (work / "load.json").write_text(json.dumps(content))
    used = {spec.source for spec in cut.load_inputs.values() if spec.role == "constant"}
    constants = {k: v.contiguous() for k, v in program.constants.items() if k in used}
    # Not save_file: its files are their owner's alone, and others may use an artifact.
    (work / "constants.safetensors").write_bytes(save(constants))
    (work / "regions").mkdir()
    for region in plan.regions:
        text = json.dumps(graph_json.dump(region.graph))
        (work / "regions" / f"{region.name}.json").write_text(text)


def _load_input(spec: Any) -> list[Any]:
    """Role and source, and of a slice its dimension, start and length."""
    part = [spec.part.dim, spec.part.start, spec.part.length] if spec.part else []
    return [spec.role, spec.source, *part]


def _copy_model_files(source: Path, target: Path) -> None:
    target.mkdir()
    for name in MODEL_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
