"""Scales of the KV cache that a checkpoint brings, found by their names.

Quantizers write, per layer, ``….self_attn.k_scale`` and ``….v_scale`` (also under ``k_proj`` and
``v_proj``, or as their ``output_scale``): one value or one a KV head, value = code * scale. What
codes they are for is ``kv_cache_scheme`` of the quantization's settings, ``kv_cache_quant_algo`` of
ModelOpt's, else float8_e4m3. Not here: how they are stored with (`fxlm.passes.paged_attention`).
"""

from __future__ import annotations

import re
from typing import Any

import torch

from fxlm.compiler.errors import InvalidModel
from fxlm.models.checkpoint import Checkpoint
from fxlm.models.formats import quantization_of, refuse, require

FLOATS = ("F32", "BF16", "F16")
_NAME = re.compile(r"\.(\d+)\..*\b(?:([kv])_scale|([kv])_proj\.output_scale)$")


def kv_scales(
    checkpoint: Checkpoint, cache_dtype: torch.dtype | None, num_heads: int
) -> dict[int, tuple[str, str]]:
    """Names of the scales of keys and of values, by layer; empty where there are none.

    Args:
        cache_dtype: of the cache; scales for other codes than these are of no use.
        num_heads: KV heads of a layer.

    Raises:
        InvalidModel: a layer has one without the other, or one that is no scale.
    """
    if cache_dtype is None or _codes(checkpoint) != cache_dtype:
        return {}
    found: dict[int, dict[str, str]] = {}
    for name in checkpoint.tensors:
        match = _NAME.search(name)
        if match is not None:
            _require_scale(checkpoint, name, num_heads)
            found.setdefault(int(match[1]), {})[match[2] or match[3]] = name
    for layer, names in found.items():
        if len(names) != 2:
            (only,) = names.values()
            raise refuse(checkpoint, f"layer {layer} has {only!r}, but not that of the other of "
                                     "keys and values; use kv_cache_dtype auto")  # fmt: skip
    return {layer: (names["k"], names["v"]) for layer, names in found.items()}


def _codes(checkpoint: Checkpoint) -> torch.dtype | None:
    """The codes that scales of this checkpoint are for; None: they are of no use here."""
    stated = quantization_of(checkpoint)
    settings: Any = stated[1] if stated is not None else {}
    scheme = settings.get("kv_cache_scheme")
    if not isinstance(scheme, dict):
        nested = settings.get("quantization")
        algorithm = nested.get("kv_cache_quant_algo") if isinstance(nested, dict) else None
        return torch.float8_e4m3fn if algorithm in (None, "FP8") else None
    fixed = not scheme.get("dynamic") and scheme.get("symmetric", True)
    if not fixed or scheme.get("num_bits", 8) != 8:
        return None
    return torch.int8 if scheme.get("type", "int") == "int" else torch.float8_e4m3fn


def _require_scale(checkpoint: Checkpoint, name: str, num_heads: int) -> None:
    info = require(checkpoint, name, dtypes=FLOATS, why="a scale of the KV cache")
    values = checkpoint.read(name).float().flatten()
    if values.numel() not in (1, num_heads):
        raise InvalidModel(
            f"tensor {name!r} of {checkpoint.path} has shape {list(info.shape)}, must be one value "
            f"or one for each of {num_heads} KV heads; use kv_cache_dtype auto"
        )
    if not bool((values.isfinite() & (values > 0)).all()):
        raise InvalidModel(
            f"tensor {name!r} of {checkpoint.path} holds {values.tolist()[:3]}, which are no "
            "scales of a KV cache; use kv_cache_dtype auto, or download the checkpoint again"
        )
