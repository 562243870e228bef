"""bitsandbytes checkpoints: 4-bit (nf4, fp4; nested or not) and 8-bit.

4 bits, per weight of N x K, in blocks of b values in row order:

    weight                    uint8 [N * K / 2, 1]   two codes a byte, the high nibble first
    weight.absmax             float32 [N * K / b], or uint8 codes of it where nested
    weight.quant_map          float32 [16]           the code book
    weight.nested_absmax      float32, a value per nested block of absmax
    weight.nested_quant_map   float32 [256]
    weight.quant_state.bitsandbytes__nf4             JSON as bytes: shape, blocksize, …

8 bits: ``weight`` int8 [N, K] and ``SCB`` float32 [N], the value is code * SCB / 127. Inputs stay
16-bit there too; LLM.int8 rounds all but outliers. Source: https://github.com/bitsandbytes-foundation/bitsandbytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fxlm.compiler import ops
from fxlm.models.formats import LogicalTensor, refuse, require

if TYPE_CHECKING:
    from fxlm.models.checkpoint import Checkpoint

STATE = ".quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """What the JSON beside a 4-bit weight says."""

    shape: tuple[int, int]
    block: int
    nested_block: int
    nested_offset: float

    @property
    def count(self) -> int:
        return self.shape[0] * self.shape[1]


def read(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, LogicalTensor]:
    """The dense weights; see `fxlm.models.formats`.

    Raises:
        InvalidModel: an unknown code, or tensors that do not fit each other.
    """
    ops.load()
    made = {}
    for name in checkpoint.tensors:
        if STATE in name:
            weight, _, kind = name.partition(STATE)
            if kind not in KINDS:
                raise refuse(checkpoint, f"{weight} is {kind!r}; read are {', '.join(KINDS)}")
            made[weight] = _four_bits(checkpoint, weight, name)
        elif name.endswith(".SCB"):
            weight = name.removesuffix(".SCB") + ".weight"
            made[weight] = _eight_bits(checkpoint, weight, name)
    return made


def _eight_bits(checkpoint: Checkpoint, name: str, scales: str) -> LogicalTensor:
    shape = require(checkpoint, name, dtypes=("I8",), why=f"{scales} is there").shape
    require(checkpoint, scales, dtypes=FLOATS, shape=shape[:1])

    def build(codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        scale = (absmax.float() / 127.0).unsqueeze(1)
        made: torch.Tensor = torch.ops.fxlm.dequantize(
            codes, scale, None, None, 8, [1, 0], torch.float32, "none"
        )
        return made

    return LogicalTensor(
        name=name, dtype=torch.float32, shape=shape, sources=(name, scales), build=build
    )


def _four_bits(checkpoint: Checkpoint, name: str, described: str) -> LogicalTensor:
    state = _state(checkpoint, described)
    outputs, inputs = state.shape
    blocks = -(-state.count // state.block)
    require(checkpoint, name, dtypes=("U8",), shape=(-(-state.count // 2), 1), why=described)
    require(checkpoint, f"{name}.quant_map", dtypes=("F32",), shape=(16,))
    sources = [name, f"{name}.absmax", f"{name}.quant_map"]
    if state.nested_block:
        require(checkpoint, f"{name}.absmax", dtypes=("U8",), shape=(blocks,))
        nested = (-(-blocks // state.nested_block),)
        require(checkpoint, f"{name}.nested_absmax", dtypes=("F32",), shape=nested)
        require(checkpoint, f"{name}.nested_quant_map", dtypes=("F32",), shape=(256,))
        sources += [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
    else:
        require(checkpoint, f"{name}.absmax", dtypes=("F32",), shape=(blocks,))

    def build(
        packed: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, *nested: torch.Tensor
    ) -> torch.Tensor:
        codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=-1).to(torch.int8)
        scale = _unnested(absmax, *nested, state=state) if nested else absmax
        # Blocks run over the ends of rows where these are no multiple: then one long row.
        whole = inputs % state.block == 0
        rows, columns = (outputs, inputs) if whole else (1, state.count)
        made: torch.Tensor = torch.ops.fxlm.dequantize(
            codes.view(-1)[: state.count].view(rows, columns), scale.view(rows, -1), None, table,
            4, [1, state.block], torch.float32, "none",
        )  # fmt: skip
        return made.view(outputs, inputs)

    return LogicalTensor(
        name=name, dtype=torch.float32, shape=state.shape, sources=tuple(sources), build=build
    )


def _unnested(
    codes: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, *, state: _State
) -> torch.Tensor:
    """The absmax of each block, which is quantized itself, by 8-bit codes in blocks."""
    each = absmax.repeat_interleave(state.nested_block)[: codes.shape[0]]
    return table.index_select(0, codes.to(torch.int64)) * each + state.nested_offset


def _state(checkpoint: Checkpoint, name: str) -> _State:
    require(checkpoint, name, dtypes=("U8",))
    try:
        values = json.loads(bytes(checkpoint.read(name).tolist()))
        rows, columns = (int(size) for size in values["shape"])
        state = _State(
            shape=(rows, columns), block=int(values["blocksize"]),
            nested_block=int(values.get("nested_blocksize") or 0),
            nested_offset=float(values.get("nested_offset") or 0.0),
        )  # fmt: skip
        if min(rows, columns, state.block) < 1 or state.nested_block < 0:
            raise ValueError(f"{values['shape']} in blocks of {values['blocksize']}")
        if not math.isfinite(state.nested_offset):
            raise ValueError(f"nested_offset {state.nested_offset}")
        return state
    except (ValueError, KeyError, TypeError) as error:
        raise refuse(checkpoint, f"{name} is no quantization state: {error!r}") from error
