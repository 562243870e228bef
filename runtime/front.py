"""Front: a checkpoint captured, and the column of passes that its options mean.

Everything of a compilation before the first pass; `compile` and `explain` both start here. Not
here: running the passes (`fxlm.compiler.pipeline`), what becomes of them (`compile`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fxlm.compiler.artifact import dtype_name
from fxlm.compiler.errors import InvalidOption
from fxlm.compiler.ops import cpu_implementation
from fxlm.compiler.ops.build import REFERENCE, cpu_flags
from fxlm.compiler.options import CompileOptions, resolve_cache_dtype, resolve_dtype
from fxlm.compiler.pipeline import GraphPass, disable, order
from fxlm.compiler.program import Facts, Program, Raw
from fxlm.models.checkpoint import Checkpoint
from fxlm.passes.column import REQUIRED, default_column

if TYPE_CHECKING:  # transformers' rules need not be imported to find an artifact
    from fxlm.models.binding import Binding

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Front:
    """A captured model before any pass.

    Attributes:
        program: at stage ``captured``.
        column: passes to run on it, with their settings.
        binding: how tensors of the checkpoint become parameters.
    """

    program: Program
    column: list[GraphPass]
    binding: Binding


def front(
    checkpoint: Checkpoint,
    options: CompileOptions,
    stage: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    built: Callable[[], None] = lambda: None,
) -> Front:
    """Build and capture a model, and lay out its column.

    Args:
        checkpoint: opened.
        options: see `CompileOptions`.
        stage: entered with the name of each stage while it runs.
        built: called when the module is built, and what that takes is imported.

    Raises:
        UnsupportedModel: the model does not build or does not capture.
    """
    with stage("import"):
        from fxlm.compiler.capture import capture
        from fxlm.models.binding import bind
        from fxlm.models.build import build_model
        from fxlm.models.rope import fix_lengths
    options, dtype = resolved(checkpoint, options)
    with stage("build"):
        model = build_model(checkpoint, dtype, trust_remote_code=options.trust_remote_code)
        built()
        facts = _facts(checkpoint, model, options, dtype)
        fix_lengths(model, options.max_model_len or facts.max_position_embeddings)
        binding = bind(checkpoint, model)
    with stage("capture"):
        program = capture(model, facts)
    raw = {n: _raw_type(checkpoint, n) for n in binding.names}
    column = column_of(options, bind_checkpoint={"convert": binding.convert, "raw": raw})
    return Front(program=program, column=column, binding=binding)


def resolved(checkpoint: Checkpoint, options: CompileOptions) -> tuple[CompileOptions, torch.dtype]:
    """The options with packing decided, and the dtype that they mean for this checkpoint."""
    dtype, _ = resolve_dtype(options.dtype, stored_dtype(checkpoint), options.device)
    packs, why = packing(options, dtype)
    _log.info("weights are %spacked: %s", "" if packs else "not ", why)
    return replace(options, pack_weights=packs), dtype


def _facts(
    checkpoint: Checkpoint, model: Any, options: CompileOptions, dtype: torch.dtype
) -> Facts:
    from fxlm.models.facts import facts

    found = facts(model.config)
    return Facts(
        model_type=found.model_type,
        vocab_size=found.vocab_size,
        max_position_embeddings=found.max_position_embeddings,
        num_layers=found.num_layers,
        dtype=dtype,
        device=torch.device(options.device),
        block_size=options.block_size,
        kv_scales=_kv_scales(checkpoint, options, found.num_kv_heads),
    )


def _kv_scales(
    checkpoint: Checkpoint, options: CompileOptions, num_heads: int
) -> dict[int, tuple[Raw, Raw]]:
    """By layer, the tensors that hold the scales of the KV cache; see `models.kv_scales`."""
    from fxlm.models.kv_scales import kv_scales

    def raw(name: str) -> Raw:
        return name, *_raw_type(checkpoint, name)

    found = kv_scales(checkpoint, resolve_cache_dtype(options.kv_cache_dtype), num_heads)
    made = {layer: (raw(k), raw(v)) for layer, (k, v) in found.items()}
    for name, _, shape in (each for pair in made.values() for each in pair):
        if options.ranks > 1 and math.prod(shape) > 1:
            raise InvalidOption(
                "kv_cache_dtype", options.kv_cache_dtype,
                f"{name!r} of {checkpoint.path} has a scale a head, and several ranks cannot "
                "divide them; use auto, or tensor_parallel_size 1",
            )  # fmt: skip
    if made:
        _log.info("KV cache: scales of %d layers are the checkpoint's own", len(made))
    return made


def stored_dtype(checkpoint: Checkpoint) -> str:
    """Name of the dtype that the checkpoint's config states, or ``""``."""
    config = checkpoint.config
    nested = config.get("text_config") or {}
    found = [c.get(k) for c in (config, nested) for k in ("dtype", "torch_dtype") if c.get(k)]
    return str(found[0]) if found else ""


def _raw_type(checkpoint: Checkpoint, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
    tensor = checkpoint.read(name)
    return tensor.dtype, tuple(tensor.shape)


def column_of(options: CompileOptions, **settings: dict[str, Any]) -> list[GraphPass]:
    """The passes that these options run, in order, with settings of some by name.

    Packing must be resolved; see `packing`.
    """
    assert options.pack_weights is not None, options
    for name in options.disabled:
        if name in REQUIRED:
            raise InvalidOption("--disable-pass", name, "the engine cannot run without it")
    if options.ranks > 1 and "shard" in options.disabled:
        raise InvalidOption("--disable-pass", "shard", "several ranks stand on it")
    if options.stages > 1 and "cut_stages" in options.disabled:
        raise InvalidOption("--disable-pass", "cut_stages", "several stages stand on it")
    if options.verify and "verify" in options.disabled:
        raise InvalidOption("--disable-pass", "verify", "speculative decoding stands on it")
    settings |= {"steer": {"points": options.steer}, "tap": {"points": options.tap}}
    cached = {"cache_dtype": resolve_cache_dtype(options.kv_cache_dtype)}
    settings["paged_attention"] = {**cached, **settings.get("paged_attention", {})}
    settings["cut_stages"] = {
        "stages": options.stages, "stage": options.stage, "ranks": options.ranks
    }  # fmt: skip
    settings["shard"] = {
        "ranks": options.ranks, "rank": options.rank,
        "sequence_parallel": options.sequence_parallel,
    }  # fmt: skip
    settings["quantize"] = {"quantization": options.quantization}
    wanted = {
        "cut_stages": options.stages > 1,
        "pack_linears": options.pack_weights,
        "quantize": options.quantization is not None,
        "shard": options.ranks > 1,
        "steer": options.steer,
        "tap": options.tap,
        "verify": options.verify,
    }
    unused = [name for name, given in wanted.items() if not given]
    column = order(default_column(**settings), options.passes)
    return disable(column, (*options.disabled, *unused))


def packing(options: CompileOptions, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether the pass `pack_linears` is in the column, and why."""
    if options.pack_weights is not None:
        return options.pack_weights, "asked for"
    if not options.device.startswith("cpu"):
        return False, f"there are no kernels for {options.device}"
    if dtype not in (torch.float32, torch.bfloat16):
        return False, f"oneDNN serves {dtype_name(dtype)}"
    isa = cpu_implementation()
    if "amx_bf16" in cpu_flags() and isa != "amx":
        return False, f"this CPU has AMX, which oneDNN uses and the kernels ({isa}) do not"
    if isa in ("generic", REFERENCE):
        return False, f"the kernels of this CPU ({isa}) are not fast"
    return True, f"the kernels ({isa}) read packed weights as one stream"
