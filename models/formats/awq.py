"""AWQ checkpoints of the ``gemm`` version.

Per linear layer of N outputs and K inputs, 4-bit codes, groups of g inputs:

    qweight  int32 [K, N / 8]       codes 0..15, eight outputs a word
    qzeros   int32 [K / g, N / 8]   zero points, likewise
    scales   float [K / g, N]

Nibble j of a word, lowest first, is output ``(0, 2, 4, 6, 1, 3, 5, 7)[j]`` of its eight. Source:
the packing code of AutoAWQ, https://github.com/casper-hansen/AutoAWQ. The gemv versions pack
otherwise and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fxlm.compiler import ops
from fxlm.models.formats import LogicalTensor, matrix, num_groups, refuse, require
from fxlm.models.formats.bits import unpack_words

if TYPE_CHECKING:
    from fxlm.models.checkpoint import Checkpoint

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble of each of the eight outputs
BITS, HALF = 4, 8
FLOATS = ("F16", "BF16", "F32")


def read(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, LogicalTensor]:
    """The dense weights; see `fxlm.models.formats`.

    Raises:
        InvalidModel: another version or width, or tensors that do not fit each other.
    """
    ops.load()
    version = str(config.get("version", "gemm")).lower()
    bits = config.get("bits", config.get("w_bit", BITS))
    if version != "gemm":
        raise refuse(checkpoint, f"AWQ version {version!r}; gemm is read")
    if bits != BITS:
        raise refuse(checkpoint, f"AWQ with bits={bits!r}; 4 is read")
    modules = [n.removesuffix(".qweight") for n in checkpoint.tensors if n.endswith(".qweight")]
    size = config.get("group_size", config.get("q_group_size"))
    zeros = config.get("zero_point") is True
    made = (_linear(checkpoint, module, size, zeros) for module in modules)
    return {tensor.name: tensor for tensor in made}


def _linear(checkpoint: Checkpoint, module: str, size: Any, zero_point: bool) -> LogicalTensor:
    inputs, words = matrix(checkpoint, f"{module}.qweight", dtypes=("I32",))
    outputs = words * 8
    groups = matrix(checkpoint, f"{module}.scales", dtypes=FLOATS)[0]
    groups = groups if size is None else num_groups(checkpoint, inputs, size)
    why = "" if size is None else f"group_size {size}, {inputs} inputs"
    require(checkpoint, f"{module}.scales", dtypes=FLOATS, shape=(groups, outputs), why=why)
    sources = [f"{module}.qweight", f"{module}.scales"]
    if zero_point or f"{module}.qzeros" in checkpoint.tensors:
        why = "zero_point: true"
        require(checkpoint, f"{module}.qzeros", dtypes=("I32",), shape=(groups, words), why=why)
        sources.append(f"{module}.qzeros")
    group = -(-inputs // max(groups, 1))

    def build(qweight: torch.Tensor, scales: torch.Tensor, *zeros: torch.Tensor) -> torch.Tensor:
        scale = scales.float().t()
        offset = -_outputs(zeros[0]).float() * scale if zeros else None
        made: torch.Tensor = torch.ops.fxlm.dequantize(
            _outputs(qweight), scale, offset, None, BITS, [1, group], torch.float32, "none"
        )
        return made

    return LogicalTensor(
        name=f"{module}.weight", dtype=torch.float32, shape=(outputs, inputs),
        sources=tuple(sources), build=build,
    )  # fmt: skip


def _outputs(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, N / 8] -> codes less 8, int8 [N, R]."""
    nibbles = unpack_words(words, BITS, HALF).unflatten(-1, (-1, 8))
    ordered = torch.stack([nibbles[..., place] for place in PLACES], dim=-1)
    return ordered.flatten(-2).t()
