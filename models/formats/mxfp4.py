"""MXFP4 experts, as gpt-oss has them.

A weight ``experts.gate_up_proj`` or ``down_proj`` of the model, [E, K, N], is on disk

    …_blocks  uint8 [E, N, K / 32, 16]   FP4 E2M1 codes, two a byte, the low nibble first
    …_scales  uint8 [E, N, K / 32]       exponents of two, biased by 127

Source: OCP Microscaling Formats v1.0; transformers' ``convert_moe_packed_tensors``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fxlm.compiler import ops
from fxlm.models.formats import LogicalTensor, require

if TYPE_CHECKING:
    from fxlm.models.checkpoint import Checkpoint

BLOCK, BIAS = 32, 127


def read(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, LogicalTensor]:
    """The dense weights; see `fxlm.models.formats`.

    Raises:
        InvalidModel: blocks without scales, or of another shape.
    """
    ops.load()
    names = [n.removesuffix("_blocks") for n in checkpoint.tensors if n.endswith("_blocks")]
    return {name: _experts(checkpoint, name) for name in names}


def _experts(checkpoint: Checkpoint, name: str) -> LogicalTensor:
    given = require(checkpoint, f"{name}_blocks", dtypes=("U8",)).shape
    wanted = (*given[:3], BLOCK // 2) if len(given) == 4 else (0, 0, 0, BLOCK // 2)
    require(checkpoint, f"{name}_blocks", dtypes=("U8",), shape=wanted, why="MXFP4")
    require(checkpoint, f"{name}_scales", dtypes=("U8",), shape=wanted[:3], why="MXFP4")
    experts, outputs, blocks, _ = wanted

    def build(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).to(torch.int8)
        exponents = scales.to(torch.int32) - BIAS
        scale = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
        table = torch.ops.fxlm.code_book(scale, "fp4")
        made: torch.Tensor = torch.ops.fxlm.dequantize(
            nibbles.flatten(2), scale, None, table, 4, [1, BLOCK], torch.float32, "none"
        )
        return made.transpose(1, 2)

    return LogicalTensor(
        name=name, dtype=torch.float32, shape=(experts, blocks * BLOCK, outputs),
        sources=(f"{name}_blocks", f"{name}_scales"), build=build,
    )  # fmt: skip
