"""Launch: what the commands do, and what an engine process starts from.

Here: `compile`, `plan`, `check` and `quantize` as commands, the specification of an engine for the
server, and the factory in the engine process. Everything that a person reads of them is
printed here. Importing this file imports no torch: the server's process stays light.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxlm.compiler.errors import InvalidOption
from fxlm.runtime.options import EngineOptions, from_mapping
from fxlm.runtime.parallel.choice import choose_backend, num_ranks, torchrun_process

if TYPE_CHECKING:
    from fxlm.runtime.compile import Compilation
    from fxlm.runtime.engine import Engine

HANG_S = 4.0  # the ranks notice each other first
IDLE_S = 60.0  # one rank waits for nobody: a drafter of the user's hangs, or the process is stopped
SMALL_BYTES = 64 << 20  # of weights, which a step reads in a millisecond or two
FACTORY = "fxlm.runtime.launch:make_engine"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """What the server needs to start an engine and to speak its language.

    Attributes:
        factory: ``module:function`` called in the engine process.
        kwargs: its plain keyword arguments.
        name: of the model as the user wrote it.
        directory: holds config, tokenizer, template and generation defaults.
        tokenizer: directory of the tokenizer (usually the same).
        hang_s: after which the engine's process is taken for lost; see `EngineClient.start`.
    """

    factory: str
    kwargs: dict[str, Any]
    name: str
    directory: Path
    tokenizer: Path
    hang_s: float | None = None


def engine_options(args: argparse.Namespace) -> EngineOptions:
    """The engine's part of parsed flags; flags not given keep their defaults."""
    names = {f.name for f in fields(EngineOptions)}
    options = from_mapping({k: v for k, v in vars(args).items() if k in names})
    if getattr(args, "tiered_start", False) is None:  # not said: on, where it can be
        return replace(options, tiered_start=num_ranks(options) == 1)
    return options


def prepare(args: argparse.Namespace) -> EngineSpec:
    """Resolve the model (downloading a hub id) and describe its engine.

    Compiling is left to the engine process, which reports its progress there.
    """
    from fxlm.models.checkpoint import resolve

    options = engine_options(args)
    directory = resolve(options.model, options.revision, options.trust_remote_code)
    tokenizer = getattr(args, "tokenizer", None)
    return EngineSpec(
        factory=FACTORY,
        kwargs=options.as_json(),
        name=options.model,
        directory=directory,
        tokenizer=resolve(tokenizer) if tokenizer else directory,
        hang_s=options.distributed_timeout_seconds + HANG_S if num_ranks(options) > 1 else IDLE_S,
    )


def serve_as_rank(args: argparse.Namespace) -> int | None:
    """Where torchrun started this process as a rank other than 0: be one, and give the exit code.

    Raises:
        InvalidOption: torchrun started another number of processes than there are ranks.
    """
    options = engine_options(args)
    if choose_backend(options)[0] != "external_launcher":
        return None
    if torchrun_process(num_ranks(options)).rank == 0:
        return None
    from fxlm.runtime.parallel.torchrun import serve_rank

    return serve_rank(options)


def make_engine(**values: Any) -> Engine:
    """Factory for the engine process: options as plain values, progress on standard error."""
    from fxlm.runtime.explain import stamp
    from fxlm.runtime.machine import num_cores, process_started
    from fxlm.runtime.worker import build_engine, set_threads

    options = from_mapping(values)
    phases = {"start engine": time.time() - process_started()}
    started = time.perf_counter()

    def report(stage: str, seconds: float) -> None:
        phases[stage] = seconds
        _report(stage, seconds)

    if leaves_core(options):
        threads, _ = set_threads(num_cores()[0] - 1)
        options = replace(options, threads=threads)
        why = "a core is left to the server, whose work is as long as a step of so small a model"
    else:
        threads, why = set_threads(options.threads)
    _say(f"threads {threads} ({why})")
    if num_ranks(options) > 1:
        backend, why = choose_backend(options)
        _say(f"{num_ranks(options)} ranks by {backend} ({why})")
    engine, plan, compilation = build_engine(options, report)
    if compilation.miss is not None:
        _say(f"compiled since {compilation.miss.text}")
    _say(f"artifact {'found' if compilation.cached else 'made'}: {compilation.artifact.path}")
    _say(stamp.line(compilation.artifact, compilation.checkpoint.weights_digest()))
    for line in plan.lines():
        _say(line)
    took = time.perf_counter() - started
    phases["rest"] = took - (sum(phases.values()) - phases["start engine"])
    passes = {p["name"]: (p["rewrites"], p["seconds"])
              for p in compilation.artifact.manifest["passes"]}  # fmt: skip
    found = "hit" if compilation.miss is None else compilation.miss.kind
    engine.started(dict(phases), found, passes)
    if num_ranks(options) == 1:
        _check_weights(engine, options, compilation)
    _say(f"engine ready after {took:.1f} s, {engine.worker.tier}")
    return engine


def leaves_core(options: EngineOptions) -> bool:
    """Whether a server should run this model on one core less than there are.

    A step of a small model is as short as what the server does meanwhile. On the same cores, each
    turn of the server's then holds up all threads of a step, which wait for one another.
    """
    from fxlm.runtime.compile import open_for
    from fxlm.runtime.machine import num_cores
    from fxlm.runtime.options import resolve_device

    chosen = options.threads is not None or num_ranks(options) > 1
    if chosen or num_cores()[0] == 1 or resolve_device(options.device)[0] != "cpu":
        return False
    return open_for(options).num_bytes < SMALL_BYTES


def _check_weights(engine: Engine, options: EngineOptions, compilation: Compilation) -> None:
    """Hold mapped weights against their checksums meanwhile; the engine is told."""
    from fxlm.runtime import integrity
    from fxlm.runtime.tiers import wake
    from fxlm.runtime.worker import prepared_file

    def told(state: str) -> None:
        engine.weights_are(state)
        wake()

    path = prepared_file(compilation, options)
    if path is not None and path.exists():
        engine.weights_are("unchecked")
        integrity.watch(path, told)


def explain_cache_command(args: argparse.Namespace) -> int:
    """``fxlm explain-cache``: each factor of the key, and what differs from the nearest."""
    from fxlm.compiler.cache import cache_directory
    from fxlm.runtime.cache import explain, target_of
    from fxlm.runtime.compile import open_for
    from fxlm.runtime.options import compile_options

    options = engine_options(args)
    root = cache_directory(options.cache_dir)
    target = target_of(open_for(options), compile_options(options), root)
    print("\n".join(explain(target, root)))
    return 0


def compile_command(args: argparse.Namespace) -> int:
    """``fxlm compile``: stages with their seconds, then where the artifact of each rank is."""
    from fxlm.runtime.drafting import compile_draft

    started = time.perf_counter()
    options = engine_options(args)
    result, *others = _compile_ranks(options, getattr(args, "output", None))
    artifact = result.artifact
    draft = compile_draft(options, artifact, _report)
    for line in artifact.manifest["passes"]:
        print(f"  pass {line['name']:<18}{line['rewrites']:>5} rewrites "
              f"{line['nodes_before']:>6} -> {line['nodes_after']} nodes")  # fmt: skip
    seconds = time.perf_counter() - started
    how = "already compiled, nothing to do" if result.cached else "compiled"
    regions = artifact.manifest["regions"]
    calls = len(artifact.manifest["calls"])
    print(f"{how}: {len(regions)} regions called {calls} times a step, "
          f"{artifact.nbytes / 2**20:.1f} MiB, {seconds:.1f} s")  # fmt: skip
    print(artifact.path)
    for rank, other in enumerate(others, 1):
        print(f"rank {rank}: {other.artifact.path}")
    if draft is not None:
        print(f"draft model: {draft.artifact.path}")
    return 0


def _compile_ranks(options: EngineOptions, output: str | None) -> list[Compilation]:
    """The artifact of every rank; of a single one, at ``output`` if that is given.

    Raises:
        InvalidOption: the artifacts of several ranks have no place in one directory.
    """
    from fxlm.runtime.compile import compile_for

    if num_ranks(options) == 1:
        place = Path(output) if output else None
        return [compile_for(options, output=place, report=_report)]
    from fxlm.runtime.parallel.build import compile_ranks, refuse_ranks

    if output:
        reason = "each rank has an artifact of its own; leave it out, and they go into the cache"
        raise InvalidOption("--output", output, reason)
    refuse_ranks(options)
    return compile_ranks(options, num_ranks(options), _report)


def plan_command(args: argparse.Namespace) -> int:
    """``fxlm plan``: what the model needs and what fits, before anything is loaded."""
    from fxlm.compiler.options import resolve_dtype
    from fxlm.runtime.compile import compile_for
    from fxlm.runtime.drafting import compile_draft
    from fxlm.runtime.front import stored_dtype
    from fxlm.runtime.memory import plan_memory
    from fxlm.runtime.options import resolve_device
    from fxlm.runtime.quantize import describe
    from fxlm.runtime.worker import set_threads

    sizes, stages = args.tensor_parallel_size or (1,), args.pipeline_parallel_size or (1,)
    args.tensor_parallel_size, args.pipeline_parallel_size = max(sizes), max(stages)
    options = engine_options(args)
    if args.hardware is not None:
        return _plan_hardware(options, args.hardware, sizes, stages)
    for name, given in (("tensor", sizes), ("pipeline", stages)):
        if len(given) > 1:
            reason = "several go with --hardware alone"
            raise InvalidOption(f"--{name}-parallel-size", given, reason)
    # The graph is enough to plan from; nothing is compiled and no weight is read.
    made = compile_for(replace(options, enforce_eager=True), report=_report)
    draft = compile_draft(replace(options, enforce_eager=True), made.artifact, report=_report)
    ranks = sizes[0] * stages[0]
    plan = plan_memory(made.artifact, options, draft.artifact if draft else None, share=ranks)
    device, why_device = resolve_device(options.device)
    _, why_dtype = resolve_dtype(options.dtype, stored_dtype(made.checkpoint), device)
    dtype = made.artifact.manifest["model"]["dtype"]
    threads, why_threads = set_threads(options.threads)
    scheme, why_scheme = describe(options.quantization, made.checkpoint, made.artifact)
    for name, value, why in (
        ("device", device, why_device),
        ("dtype", dtype, why_dtype),
        ("quantization", scheme, why_scheme),
        ("threads", str(threads), why_threads),
    ):
        print(f"{name:<26}{value:>18}   {why}")
    lines = plan.lines()
    if ranks > 1:
        lines.insert(0, f"of {ranks} ranks, the first of stage 0:")
    for stage in range(1, stages[0]):
        rank = stage * sizes[0]
        other = compile_for(replace(options, enforce_eager=True), rank=rank, report=_report)
        lines += ["", f"the first rank of stage {stage}:"]
        lines += plan_memory(other.artifact, options, share=ranks).lines()
    print("\n".join(lines))
    return 0


def _plan_hardware(
    options: EngineOptions, choice: str, sizes: Sequence[int], stages: Sequence[int]
) -> int:
    """A line for each number of ranks and stages, on a machine that need not be this one."""
    from fxlm.models.facts import facts
    from fxlm.runtime.compile import open_for
    from fxlm.runtime.hardware_plan import plan_ranks, read_hardware, table

    hardware = read_hardware(choice)
    plans = plan_ranks(options, hardware, sizes, stages, _report)
    longest = facts(open_for(options).config).max_position_embeddings
    print("\n".join(table(hardware, plans, options.max_model_len or longest)))
    return 0 if any(not plan.refusal for plan in plans) else 1


def quantize_command(args: argparse.Namespace) -> int:
    """``fxlm quantize``: a line a layer, then how much smaller the checkpoint is."""
    from fxlm.compiler.schemes import OPTION
    from fxlm.runtime.quantize import quantize_checkpoint

    try:
        done = quantize_checkpoint(
            args.model,
            args.scheme,
            Path(args.output),
            calibration=Path(args.calibration) if args.calibration else None,
            budget_error=args.budget_error,
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
        )
    except InvalidOption as error:
        if error.field != OPTION:
            raise
        raise InvalidOption("--scheme", error.value, error.remedy) from error  # its name here
    for line in done.lines():
        print(line)
    print(args.output)
    return 0


def check_command(args: argparse.Namespace) -> int:
    """``fxlm check``: tokens and log-probabilities against transformers; 1 if they differ."""
    from fxlm.runtime.check import check_logprobs, check_tokens

    options = engine_options(args)
    tokens = check_tokens(options)
    print(f"greedy tokens in float32: {tokens.num_equal} of {len(tokens.ours)} prompts equal "
          "to transformers' generate")  # fmt: skip
    for index, (ours, theirs) in enumerate(zip(tokens.ours, tokens.theirs, strict=True)):
        if ours != theirs:
            print(f"  prompt {index}: ours {ours}\n            theirs {theirs}")
    if not tokens.equal:
        print(f"  smallest logit margin where they part: {tokens.margin:.3g}")
    scores = check_logprobs(options)
    verdict = "within" if scores.within else "BEYOND"
    print(f"log-probabilities in {scores.dtype} against float32: largest error {scores.ours:.4f}, "
          f"transformers' own {scores.theirs:.4f}; {verdict} tolerance")  # fmt: skip
    return 0 if tokens.equal and scores.within else 1


def _report(stage: str, seconds: float) -> None:
    _say(f"{stage:<22}{seconds:6.1f} s")


def _say(text: str) -> None:
    print(f"fxlm: {text}", file=sys.stderr, flush=True)
