"""Weights in canonical quantized form, as nodes of a graph; used by several passes.

A quantized weight is one call of ``fxlm::dequantize`` (see `fxlm.compiler.ops.quantized`). Here:
reading such a node, telling whether several can be merged, merging them. No pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxlm.compiler.program import Program

aten = torch.ops.aten
ops = torch.ops.fxlm


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """The arguments of a ``fxlm::dequantize`` node, typed."""

    codes: fx.Node
    scale: fx.Node
    offset: fx.Node | None
    table: fx.Node | None
    bits: int
    block: tuple[int, int]
    dtype: torch.dtype
    activation: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return tuple(int(s) for s in self.codes.meta["val"].shape)


def quantized(node: object) -> Quantized | None:
    """What a node dequantizes; None if it is another op."""
    if not isinstance(node, fx.Node) or node.target is not ops.dequantize.default:
        return None
    args: Any = node.args
    return Quantized(
        codes=args[0], scale=args[1], offset=args[2], table=args[3], bits=args[4],
        block=(args[5][0], args[5][1]), dtype=args[6], activation=args[7],
    )  # fmt: skip


def differing(weights: Sequence[object]) -> str:
    """Why weights cannot be concatenated along their outputs in quantized form, or ``""``.

    Weights of which none is quantized do not differ.
    """
    found = [quantized(weight) for weight in weights]
    parts = [part for part in found if part is not None]
    if not parts:
        return ""
    if len(parts) < len(found):
        return "some of the weights are quantized, others are not"
    if len({_kind(part) for part in parts}) > 1:
        return "the weights are quantized in different ways"
    rows = parts[0].block[0]
    if rows > 1 and any(part.shape[0] % rows for part in parts[:-1]):
        return f"blocks of {rows} outputs would span two weights"
    return ""


def _kind(part: Quantized) -> tuple[object, ...]:
    """What must be the same in weights that are merged."""
    table: object = part.table
    if part.table is not None and part.table.target is ops.code_book.default:
        table = part.table.args[1]  # equal by name; other tables only if they are one node
    codes = part.codes.meta["val"].dtype
    zero_points = part.offset is not None
    return (part.bits, part.block, part.dtype, part.activation, codes, table, zero_points)


def concatenate(program: Program, weights: Sequence[object], like: fx.Node) -> fx.Node:
    """One weight of several, outputs one after another, at the graph's insertion point.

    Args:
        weights: nodes that do not differ; see `differing`.
        like: node whose module path the new ones take over.
    """
    parts = [part for part in map(quantized, weights) if part is not None]
    if not parts:
        return program.call(aten.cat.default, list(weights), 0, like=like)
    first = parts[0]
    codes = program.call(aten.cat.default, [part.codes for part in parts], 0, like=like)
    scale = _join(program, parts, [part.scale for part in parts], like)
    offsets = [part.offset for part in parts if part.offset is not None]
    offset = _join(program, parts, offsets, like) if offsets else None
    block = [first.block[0] or 1, first.block[1]]
    return program.call(
        ops.dequantize.default, codes, scale, offset, first.table, first.bits, block, first.dtype,
        first.activation, like=like,
    )  # fmt: skip


def _join(
    program: Program, parts: Sequence[Quantized], scales: list[fx.Node], like: fx.Node
) -> fx.Node:
    """Scales one after another; one for a whole weight is repeated for each of its outputs."""
    if parts[0].block[0] == 0:
        scales = [
            program.call(aten.repeat.default, scale, [part.shape[0], 1], like=like)
            for part, scale in zip(parts, scales, strict=True)
        ]
    return program.call(aten.cat.default, scales, 0, like=like)
