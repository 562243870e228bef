"""EngineOptions: everything a user may choose about an engine, typed and JSON-able.

The command line, `LLM` and the engine process share this one class. ``auto`` values (None)
are resolved once, by `fxlm.runtime.memory`, each with its reason.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from fxlm.compiler.errors import InvalidOption
from fxlm.compiler.nearest import hint
from fxlm.runtime.speculative_config import SpeculativeConfig, speculative_config

if TYPE_CHECKING:
    from importlib.metadata import Distribution

    from fxlm.compiler.options import CompileOptions
    from fxlm.compiler.pipeline import GraphPass

PreparedWeights = Literal["auto", "off"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """Choices of one engine; names are vLLM's where the meaning is the same.

    Attributes:
        model: directory, hub id, ``bundled`` or ``bundled-draft``.
        revision: of a hub id.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu`` or ``cuda``.
        quantization: round the weights of linear layers while they are loaded, e.g. ``int8`` or
            ``int4,head=int8``; see `fxlm.compiler.schemes`.
        max_model_len: context in tokens; None: the model's, or what memory holds.
        kv_cache_memory_bytes: bytes of KV memory; None: planned.
        memory_fraction: share of the memory that planning may use.
        block_size: tokens per KV block.
        kv_cache_dtype: ``auto`` (as the activations), ``int8`` or ``fp8`` (e4m3).
        max_num_seqs: sequences per step.
        max_num_batched_tokens: tokens per step; None: 512 on CPU, 2048 on CUDA.
        enable_prefix_caching: reuse blocks of equal prefixes.
        scheduling_policy: ``fcfs``, or ``priority`` (of the request, lower first).
        enforce_eager: interpret the graph instead of compiling it.
        passes: user passes, ``file.py:name`` or pass objects.
        disable_passes: passes of the column to leave out.
        tap: modules whose output requests may ask for, e.g. ``model.layers.3``.
        steer: modules to whose output requests may add a vector.
        tensor_parallel_size: ranks that share each layer.
        sequence_parallel: between the linears of a layer, each of these ranks has its share of a
            step's tokens alone.
        pipeline_parallel_size: parts that the layers are cut into, each with ranks of its own.
        distributed_executor_backend: who starts the ranks: ``mp`` (processes of this machine),
            ``ray`` (actors of a cluster), ``external_launcher`` (torchrun has); ``auto``:
            ``external_launcher`` under torchrun, otherwise ``mp``.
        distributed_timeout_seconds: how long a rank waits for another before the engine ends.
        cache_dir: where artifacts and prepared weights are kept; None: ``$XDG_CACHE_HOME/fxlm``,
            or ``~/.cache/fxlm``.
        frozen: directory of the artifact to serve, as it is; nothing is ever compiled.
        tiered_start: serve from the uncompiled graph while another process compiles it.
        prepared_weights: ``auto`` keeps packed weights in the cache, where there is room, for
            the next start to map; ``off`` packs them at every start.
        threads: CPU threads; None: the cores this process may use; a server of a small model
            leaves one of them to itself.
        speculative_config: how tokens are drafted and verified; None: they are not.
        seed: makes requests without a seed repeatable; None draws them at random.
        trust_remote_code: run Python that comes with the checkpoint.
    """

    model: str = "bundled"
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    quantization: str | None = None
    max_model_len: int | None = None
    kv_cache_memory_bytes: int | None = None
    memory_fraction: float = 0.8
    block_size: int = 16
    kv_cache_dtype: str = "auto"
    max_num_seqs: int = 128
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    enforce_eager: bool = False
    passes: tuple[Any, ...] = ()
    disable_passes: tuple[str, ...] = ()
    tap: tuple[str, ...] = ()
    steer: tuple[str, ...] = ()
    tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    pipeline_parallel_size: int = 1
    distributed_executor_backend: Literal["auto", "mp", "ray", "external_launcher"] = "auto"
    distributed_timeout_seconds: int = 20
    cache_dir: str | None = None
    frozen: str | None = None
    tiered_start: bool = False
    prepared_weights: PreparedWeights = "auto"
    threads: int | None = None
    speculative_config: SpeculativeConfig | None = None
    seed: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _at_least("max_model_len", self.max_model_len, 2)
        _at_least("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1)
        _at_least("max_num_seqs", self.max_num_seqs, 1)
        _at_least("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        _at_least("threads", self.threads, 1)
        _at_least("tensor_parallel_size", self.tensor_parallel_size, 1)
        _at_least("pipeline_parallel_size", self.pipeline_parallel_size, 1)
        _at_least("distributed_timeout_seconds", self.distributed_timeout_seconds, 1)
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            reason = "one rank has no other to share tokens with; give tensor_parallel_size"
            raise InvalidOption("sequence_parallel", True, reason)
        if not 0.0 < self.memory_fraction <= 1.0:
            raise InvalidOption("memory_fraction", self.memory_fraction, "use 0 < value <= 1")
        if self.device not in ("auto", "cpu", "cuda"):
            raise InvalidOption("device", self.device, "use auto, cpu or cuda")

    def as_json(self) -> dict[str, Any]:
        """Plain values, for the engine process; pass objects cannot cross."""
        values = asdict(self)
        for item in self.passes:
            if not isinstance(item, str):
                raise InvalidOption("passes", item, "an engine process takes file.py:name")
        return {**values, "passes": list(self.passes)}


def from_mapping(values: Mapping[str, Any]) -> EngineOptions:
    """Options from names and values; None means the default, an unknown name is an error."""
    known = {f.name for f in fields(EngineOptions)}
    for name in values:
        if name not in known:
            near = hint(name, known, f"known: {', '.join(sorted(known))}")
            raise InvalidOption(name, values[name], f"there is no such option; {near}")
    given = {k: v for k, v in values.items() if v is not None}
    passes = tuple(given.pop("passes", ()))
    drafting = given.pop("speculative_config", None)
    try:
        typed = msgspec.convert(given, EngineOptions)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$.")
        field = place.rstrip("`").split("[")[0]
        raise InvalidOption(field, values.get(field), reason) from None
    speculative = None if drafting is None else speculative_config(drafting)
    return replace(typed, passes=passes, speculative_config=speculative)


def resolve_device(choice: str) -> tuple[str, str]:
    """The device that ``choice`` means, and why."""
    import torch

    if choice == "cuda" and not torch.cuda.is_available():
        raise InvalidOption("device", "cuda", "torch sees no CUDA device here; use cpu")
    if choice != "auto":
        return choice, "asked for"
    if torch.cuda.is_available():
        return "cuda", "torch sees a CUDA device"
    return "cpu", "torch sees no CUDA device"


def compile_options(options: EngineOptions, rank: int = 0) -> CompileOptions:
    """The part of the options that decides a rank's artifact; loads user passes."""
    from fxlm.compiler.options import CompileOptions

    device, _ = resolve_device(options.device)
    return CompileOptions(
        device=device,
        dtype=options.dtype,
        block_size=options.block_size,
        kv_cache_dtype=options.kv_cache_dtype,
        max_model_len=options.max_model_len,
        eager=options.enforce_eager,
        passes=tuple(load_pass(p) for p in options.passes),
        disabled=tuple(options.disable_passes),
        tap=tuple(options.tap),
        steer=tuple(options.steer),
        trust_remote_code=options.trust_remote_code,
        quantization=options.quantization,
        verify=options.speculative_config is not None,
        ranks=options.tensor_parallel_size,
        rank=rank % options.tensor_parallel_size,
        stages=options.pipeline_parallel_size,
        stage=rank // options.tensor_parallel_size,
        sequence_parallel=options.sequence_parallel,
    )


def load_pass(item: Any) -> GraphPass:
    """A pass object as it is, or the one that ``file.py:name`` or an installed package names.

    Raises:
        InvalidOption: no such file, no such name, or it is no pass.
    """
    from fxlm.compiler.pipeline import GraphPass

    if isinstance(item, GraphPass):
        return item
    if not isinstance(item, str):
        raise InvalidOption("passes", item, "decorate the function with @graph_pass")
    file, _, name = item.rpartition(":")
    if not file:
        return _installed_pass(item)
    if not Path(file).is_file():
        raise InvalidOption("--pass", item, "write FILE.py:NAME with a file that exists")
    module = import_file(Path(file), "--pass")
    found = getattr(module, name, None)
    if not isinstance(found, GraphPass):
        there = [key for key, value in vars(module).items() if isinstance(value, GraphPass)]
        near = hint(name, there, f"it has {', '.join(there) or 'none'}")
        reason = f"{file} has no @graph_pass function {name!r}; {near}"
        raise InvalidOption("--pass", item, reason)
    return found


def _installed_pass(name: str) -> GraphPass:
    """The pass that an installed package offers under this name of the group ``fxlm.passes``."""
    from importlib.metadata import entry_points

    from fxlm.compiler.pipeline import GraphPass

    offered = {point.name: point for point in entry_points(group="fxlm.passes")}
    if name not in offered:
        known = hint(name, offered, f"installed: {', '.join(offered) or '-'}")
        raise InvalidOption(
            "--pass", name, f"write FILE.py:NAME, or the name of an installed pass ({known})"
        )
    try:
        found = offered[name].load()
    except Exception as error:  # whatever the package raises while it is imported
        reason = f"{offered[name].value} does not import: {type(error).__name__}: {error}"
        raise InvalidOption("--pass", name, reason) from error
    if not isinstance(found, GraphPass):
        raise InvalidOption("--pass", name, f"{offered[name].value} is no @graph_pass function")
    return replace(found, origin=_origin(offered[name].dist))


def _origin(package: Distribution | None) -> str:
    """Name and version of an installed package, and the digest of what it lists as its files."""
    if package is None:
        return ""
    record = hashlib.sha256((package.read_text("RECORD") or "").encode()).hexdigest()
    return f"{package.name} {package.version} {record[:16]}"


def import_file(file: Path, option: str) -> ModuleType:
    """The module in a user's file.

    Raises:
        InvalidOption: of ``option``: the file does not import.
    """
    import sys

    name = f"fxlm_user_{file.stem}"
    loader = importlib.machinery.SourceFileLoader(name, str(file))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that the source of the pass can be found for its digest
    try:
        loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises while it is read
        reason = f"the file does not import: {type(error).__name__}: {error}"
        raise InvalidOption(option, str(file), reason) from error
    return module


def _at_least(name: str, value: int | None, low: int) -> None:
    if value is not None and value < low:
        raise InvalidOption(name, value, f"must be at least {low}")
