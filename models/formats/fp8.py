"""Checkpoints with float8_e4m3fn weights: ``quant_method`` fp8, fbgemm_fp8, or ModelOpt's FP8.

A weight [N, K] (or experts [E, N, K]) lies beside its scale, in one of three layouts:

    weight_scale_inv  [ceil(N / r), ceil(K / c)]   with ``weight_block_size`` [r, c]
    weight_scale      [N, 1] or [N]                a scale an output
    weight_scale      [] or [1]                    one for all

The value is code times scale, whichever the name (``_inv`` is the inverse of what was divided
by). Scales are float32, bfloat16, or float8_e8m0fnu. Inputs stay 16-bit, which is what CPUs
multiply, so ``input_scale`` and ``activation_scheme`` change nothing here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fxlm.compiler import ops
from fxlm.models.formats import LogicalTensor, refuse, require

if TYPE_CHECKING:
    from fxlm.models.checkpoint import Checkpoint

FLOATS = ("F32", "BF16", "F16", "F8_E8M0")
SUFFIXES = ("_scale_inv", "_scale")


def read(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, LogicalTensor]:
    """The dense weights; see `fxlm.models.formats`.

    Raises:
        InvalidModel: a weight without a scale, or one of another shape.
    """
    ops.load()
    stated = config.get("quantization") or {}
    if not isinstance(stated, dict):
        raise refuse(checkpoint, f"quantization is {stated!r}, must be an object")
    algorithm = stated.get("quant_algo", "FP8")
    if algorithm != "FP8":
        raise refuse(checkpoint, f"ModelOpt's {algorithm!r}; FP8 is read")
    if config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise refuse(checkpoint, f"fp8 of format {config['fmt']!r}; e4m3 is read")
    size = config.get("weight_block_size")
    if size is not None and not _is_block(size):
        raise refuse(checkpoint, f"weight_block_size={size!r}; must be two counts, e.g. [128, 128]")
    names = [n for n, info in checkpoint.tensors.items() if info.dtype == "F8_E4M3"]
    return {name: _weight(checkpoint, name, size) for name in names}


def _weight(checkpoint: Checkpoint, name: str, size: Any) -> LogicalTensor:
    shape = checkpoint.tensors[name].shape
    if len(shape) < 2:
        raise refuse(checkpoint, f"{name} is float8 with shape {list(shape)}, which is no weight")
    found = [f"{name}{s}" for s in SUFFIXES if f"{name}{s}" in checkpoint.tensors]
    scale = found[0] if found else f"{name}_scale"
    block = _block(shape, size if scale.endswith("_inv") else None)
    wanted = _scale_shape(shape, block)
    given = require(checkpoint, scale, dtypes=FLOATS, why=f"the scale of {name}").shape
    if size is None and _count(given) == 1:
        block = (0, 0)
        wanted = _scale_shape(shape, block)
    if given != wanted and (given != wanted[:-1] or wanted[-1] != 1) and _count(wanted) != 1:
        require(checkpoint, scale, dtypes=FLOATS, shape=wanted, why=f"the scale of {name}")

    def build(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        wide = scale.float().expand(wanted) if scale.numel() == 1 else scale.float().view(wanted)
        made: torch.Tensor = torch.ops.fxlm.dequantize(
            weight, wide.contiguous(), None, None, 8, list(block), torch.float32, "none"
        )
        return made

    return LogicalTensor(
        name=name, dtype=torch.float32, shape=shape, sources=(name, scale), build=build
    )


def _block(shape: tuple[int, ...], size: Any) -> tuple[int, int]:
    return (1, 0) if size is None else (int(size[0]), int(size[1]))


def _is_block(size: Any) -> bool:
    return (
        isinstance(size, list)
        and len(size) == 2
        and all(type(count) is int and count > 0 for count in size)
    )


def _scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    sizes = zip(shape[-2:], block, strict=True)
    return (*shape[:-2], *(-(-size // (of or size)) for size, of in sizes))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
