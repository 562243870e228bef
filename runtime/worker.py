"""ModelWorker: an artifact with its weights and its KV memory, run once a batch.

Here: memory, the call of the step, block copies, and `build_engine`. Not here: what is in a
batch (`batch`), who is in it (`scheduler`), what a command prints (`launch`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fxlm.compiler.artifact import Artifact
from fxlm.compiler.cache import cache_directory
from fxlm.compiler.errors import OutOfMemory
from fxlm.compiler.ops.kv_cache import allocate
from fxlm.compiler.step import Step
from fxlm.runtime import machine, prepared
from fxlm.runtime.batch import Batch
from fxlm.runtime.compile import Compilation, Report
from fxlm.runtime.drafting import check_draft, compile_draft, make_speculator
from fxlm.runtime.engine import Engine, EngineConfig
from fxlm.runtime.memory import MemoryPlan, plan_memory
from fxlm.runtime.options import EngineOptions
from fxlm.runtime.step import Done, StepResult, WorkerSpec
from fxlm.runtime.tiers import check_same, first_tier
from fxlm.runtime.waiting import waiting

_log = logging.getLogger(__name__)


class ModelWorker:
    """Runs steps of one model on one device.

    Args:
        artifact: opened.
        weights: prepared, by name.
        spec: sizes; KV memory is allocated here, all of it, and touched only when used.
    """

    depth = 1  # a step is over when its launch returns

    def __init__(
        self, artifact: Artifact, weights: Mapping[str, torch.Tensor], spec: WorkerSpec
    ) -> None:
        self.artifact = artifact
        self._spec = spec
        self.device = torch.device(artifact.manifest["model"]["device"])
        self._caches = self._allocate(artifact, spec)
        self._weights = weights
        self._step = Step(artifact, weights, self._caches)
        self._next: Step | None = None

    @property
    def spec(self) -> WorkerSpec:
        """Sizes of the worker."""
        return self._spec

    @property
    def tier(self) -> str:
        """``compiled``, or ``interpreted``: what runs the next step."""
        return "compiled" if (self._next or self._step).compiled else "interpreted"

    def upgrade(self, artifact: Artifact) -> None:
        """Run every step from the next one on from an artifact of the same graphs.

        May be called from another thread while a step runs. Weights and KV memory stay.

        Raises:
            ArtifactError: it is not of the same graphs, or does not open.
        """
        check_same(self.artifact, artifact)
        self._next = Step(artifact, self._weights, self._caches)
        self.artifact = artifact

    def _allocate(
        self, artifact: Artifact, spec: WorkerSpec
    ) -> dict[tuple[str, int], torch.Tensor]:
        caches = {}
        for layer, cache in enumerate(artifact.caches()):
            for name, dim in (("k", cache.key_dim), ("v", cache.value_dim)):
                columns = cache.columns(dim)
                shape = (spec.num_blocks, cache.num_kv_heads, spec.block_size, columns)
                caches[name, layer] = allocate(shape, cache.dtype, self.device)
        return caches

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Done:
        """Run the step that ``batch`` holds; its tokens are on the host when this returns."""
        waiting.look()
        if self._next is not None:
            self._step, self._next = self._next, None
        return Done(self.result(self.step(batch.tensors()), batch.wants_logprobs))

    def step(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Run a step on these inputs (on the CPU); gives the results of the graph."""
        if self.device.type != "cpu":
            tensors = {n: t.to(self.device, non_blocking=True) for n, t in tensors.items()}
        try:
            with torch.inference_mode():
                return self._step(tensors)
        except (MemoryError, torch.OutOfMemoryError) as error:
            tokens = tensors["input_ids"].shape[1]
            raise OutOfMemory(f"a step of {tokens} tokens ran out of memory: {error}") from error

    def result(self, values: Sequence[torch.Tensor], wants_logprobs: bool) -> StepResult:
        """The results of a step on the host; log-probabilities where a row asks."""
        ids, logprobs, logprob_ids, ranks, *more = values
        result = StepResult(token_ids=ids.tolist())
        if self._spec.max_drafts:
            result.num_accepted = more[0].tolist()
        result.taps = dict(
            zip(self._spec.taps, more[len(more) - len(self._spec.taps) :], strict=True)
        )
        if wants_logprobs:
            result.logprobs = logprobs.cpu().numpy()
            result.logprob_ids = logprob_ids.cpu().numpy()
            result.ranks = ranks.cpu().numpy()
        return result

    @torch.inference_mode()
    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in every layer."""
        source, target = (torch.tensor(c, device=self.device) for c in zip(*copies, strict=True))
        for cache in self._caches.values():
            blocks = cache.view(torch.uint8)  # codes of 8 bits cannot be indexed in every torch
            blocks.index_copy_(0, target, blocks.index_select(0, source))


def set_threads(choice: int | None) -> tuple[int, str]:
    """Use as many CPU threads as this process has cores, or as asked for."""
    cores, whence = machine.num_cores()
    count, why = (cores, whence) if choice is None else (choice, "asked for")
    if count > cores:
        why = "asked for, more than there are cores"
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
        if count > cores:
            _log.warning(
                "%d threads, but %d %s: they wait for one another at every layer; leave --threads "
                "out, or give at most %d", count, cores, whence, cores,
            )  # fmt: skip
    return count, why


def load_prepared(
    compilation: Compilation, options: EngineOptions
) -> tuple[dict[str, torch.Tensor], str]:
    """Weights as the artifact takes them, and where they come from, in words."""
    artifact = compilation.artifact
    device = torch.device(artifact.manifest["model"]["device"])
    folder = cache_directory(options.cache_dir) / "weights"
    return prepared.load(artifact, compilation.checkpoint, device, folder, options.prepared_weights)


def prepared_file(compilation: Compilation, options: EngineOptions) -> Path | None:
    """Where those weights are kept; None if they are not."""
    folder = cache_directory(options.cache_dir) / "weights"
    artifact, checkpoint = compilation.artifact, compilation.checkpoint
    return prepared.place_of(artifact, checkpoint, folder, options.prepared_weights).path


def build_engine(
    options: EngineOptions, report: Report | None = None
) -> tuple[Engine, MemoryPlan, Compilation]:
    """Compile or find the artifact, plan memory, load the weights.

    Args:
        options: resolved nowhere yet.
        report: called with (stage, seconds) as stages end.
    """
    if options.tensor_parallel_size * options.pipeline_parallel_size > 1:
        from fxlm.runtime.parallel.build import build_parallel

        return build_parallel(options, report)
    set_threads(options.threads)
    check_draft(options)
    compilation, background = first_tier(options, report)
    draft = compile_draft(options, compilation.artifact, report)
    plan = plan_memory(compilation.artifact, options, draft.artifact if draft else None)
    started = time.perf_counter()
    weights, origin = load_prepared(compilation, options)
    worker = ModelWorker(compilation.artifact, weights, plan.spec)
    speculator = None
    if options.speculative_config is not None:
        drafting = None
        if draft is not None:
            assert plan.draft_spec is not None
            drafted, _ = load_prepared(draft, options)
            drafting = ModelWorker(draft.artifact, drafted, plan.draft_spec)
        speculator = make_speculator(
            options.speculative_config, plan.spec, drafting,
            enable_prefix_caching=options.enable_prefix_caching,
        )  # fmt: skip
    if report is not None:
        report("load weights", time.perf_counter() - started)
        _log.info("weights: %s", origin)
    config = EngineConfig(
        enable_prefix_caching=options.enable_prefix_caching,
        policy=options.scheduling_policy,
        seed=options.seed,
    )
    engine = Engine(worker, config, speculator)
    if background is not None:
        background.then(worker.upgrade, lambda reason: _log.error("not compiled: %s", reason))
    return engine, plan, compilation
