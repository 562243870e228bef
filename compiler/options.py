"""CompileOptions: what a user may choose about a compilation, typed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxlm.compiler.errors import InvalidOption
from fxlm.compiler.pipeline import GraphPass
from fxlm.compiler.schemes import parse_quantization

DTYPES = {
    "float32": torch.float32, "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16, "half": torch.float16,
}  # fmt: skip
KV_CACHE_DTYPES = {
    "auto": None,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileOptions:
    """Choices of one compilation.

    Attributes:
        device: ``cpu`` or ``cuda``.
        dtype: element type of weights and activations; ``auto`` takes the checkpoint's.
        block_size: tokens per block of the KV cache.
        kv_cache_dtype: what the cache holds: ``auto`` (elements of the activations' type), ``int8``
            or ``fp8`` (e4m3; ``fp8_e4m3`` is the same), codes with a scale a token and head, or
            with the checkpoint's own scales where it has some for these codes.
        max_model_len: context that will be served; decides the artifact only for rotations
            that depend on it. None: what the model was made for.
        eager: leave the regions uncompiled and interpret them (no C++ compiler needed).
        passes: user passes, added to the default column.
        disabled: names of passes left out.
        trust_remote_code: run Python that comes with the checkpoint.
        quantization: scheme of the linear layers, with exceptions; see `compiler.schemes`. None:
            weights stay as the checkpoint has them.
        tap: modules whose output requests may ask for.
        steer: modules to whose output requests may add a vector.
        verify: keep the pass `verify` in the column, for speculative decoding.
        ranks, rank: how many ranks share each layer, and which of them this is for.
        stages, stage: how many parts the layers are cut into, and which of them this is for.
        sequence_parallel: between linears each rank has its share of a step's tokens alone.
        pack_weights: keep the pass `pack_linears` in the column; None: where it pays.
    """

    device: str = "cpu"
    dtype: str = "auto"
    block_size: int = 16
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    eager: bool = False
    passes: tuple[GraphPass, ...] = ()
    disabled: tuple[str, ...] = ()
    trust_remote_code: bool = False
    quantization: str | None = None
    tap: tuple[str, ...] = ()
    steer: tuple[str, ...] = ()
    verify: bool = False
    ranks: int = 1
    rank: int = 0
    stages: int = 1
    stage: int = 0
    sequence_parallel: bool = False
    pack_weights: bool | None = None

    def __post_init__(self) -> None:
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise InvalidOption("dtype", self.dtype, f"use auto, {', '.join(DTYPES)}")
        if self.device.split(":")[0] not in ("cpu", "cuda"):
            raise InvalidOption("device", self.device, "use cpu or cuda")
        if not 0 <= self.rank < self.ranks:
            raise InvalidOption("rank", self.rank, f"use 0 to {self.ranks - 1}")
        if not 0 <= self.stage < self.stages:
            raise InvalidOption("stage", self.stage, f"use 0 to {self.stages - 1}")
        for name, points in (("tap", self.tap), ("steer", self.steer)):
            if len(set(points)) != len(points):
                raise InvalidOption(name, ", ".join(points), "name each module once")
        if self.block_size < 16 or self.block_size & (self.block_size - 1):
            reason = "use a power of two from 16 on, which the kernels are made for"
            raise InvalidOption("block_size", self.block_size, reason)
        resolve_cache_dtype(self.kv_cache_dtype)
        if self.quantization is not None:
            parse_quantization(self.quantization)


def resolve_cache_dtype(choice: str) -> torch.dtype | None:
    """The element type of the KV cache that ``choice`` means; None: that of the keys."""
    if choice not in KV_CACHE_DTYPES:
        raise InvalidOption("kv_cache_dtype", choice, f"use {', '.join(KV_CACHE_DTYPES)}")
    return KV_CACHE_DTYPES[choice]


def resolve_dtype(choice: str, stored: str, device: str) -> tuple[torch.dtype, str]:
    """The dtype that ``choice`` means, and why.

    Args:
        choice: of the user, ``auto`` or a name.
        stored: the checkpoint's own, by name (``""`` if it states none).
        device: ``cpu`` or ``cuda``.
    """
    if choice != "auto":
        return DTYPES[choice], "asked for"
    if stored == "float16" and device == "cpu":
        return torch.bfloat16, "the checkpoint is float16, for which CPUs have no fast matmul"
    if stored in DTYPES:
        return DTYPES[stored], "the checkpoint's own"
    return torch.float32, "the checkpoint states none"
