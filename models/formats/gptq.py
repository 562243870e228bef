"""GPTQ checkpoints, versions 1 and 2, with and without ``desc_act``.

Per linear layer of N outputs and K inputs, b bits a code (2, 4 or 8), groups of g inputs:

    qweight  int32 [K * b / 32, N]   codes 0..2**b-1, packed along the inputs, lowest bits first
    qzeros   int32 [K / g, N * b / 32]  zero points; version 1 stores them less 1
    scales   float [K / g, N]
    g_idx    int32 [K]               group of each input; out of order with ``desc_act``

The version is ``checkpoint_format`` (``gptq`` or ``gptq_v2``). Bits and group size are taken from
the shapes, so that ``dynamic`` overrides of single layers need no reading; without any, they must
be those of the settings. 3-bit codes straddle words and are not read. Source: the packing code of
GPTQModel, https://github.com/ModelCloud/GPTQModel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fxlm.compiler import ops
from fxlm.models.formats import LogicalTensor, matrix, num_groups, refuse, require
from fxlm.models.formats.bits import in_order, require_groups, unordered, unpack_words

if TYPE_CHECKING:
    from fxlm.models.checkpoint import Checkpoint

VERSIONS = {"gptq": True, "gptq_v2": False}  # whether zero points are stored less 1
# Less 1 was taken off whole words, so it is added to whole words: a zero point of 0 borrowed.
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
FLOATS = ("F16", "BF16", "F32")
BITS = (2, 4, 8)


def read(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, LogicalTensor]:
    """The dense weights; see `fxlm.models.formats`.

    Raises:
        InvalidModel: an unknown version, or tensors that do not fit each other.
    """
    ops.load()
    version = config.get("checkpoint_format") or "gptq"
    if version not in VERSIONS:
        raise refuse(checkpoint, f"checkpoint_format {version!r}; read are {', '.join(VERSIONS)}")
    modules = [n.removesuffix(".qweight") for n in checkpoint.tensors if n.endswith(".qweight")]
    made = (_linear(checkpoint, config, module, VERSIONS[version]) for module in modules)
    return {tensor.name: tensor for tensor in made}


def _linear(
    checkpoint: Checkpoint, config: Mapping[str, Any], module: str, less: bool
) -> LogicalTensor:
    words, outputs = matrix(checkpoint, f"{module}.qweight", dtypes=("I32",))
    groups = matrix(checkpoint, f"{module}.scales", dtypes=FLOATS)[0]
    inputs, index = _inputs(checkpoint, config, module, words)
    bits = words * 32 // max(inputs, 1)
    if bits not in BITS or bits * inputs != words * 32:
        raise refuse(checkpoint, f"{module} has {bits}-bit codes; read are {BITS}")
    _agree(checkpoint, config, module, bits, (inputs, groups))
    require(checkpoint, f"{module}.scales", dtypes=FLOATS, shape=(groups, outputs))
    zeros = (groups, outputs * bits // 32)
    require(checkpoint, f"{module}.qzeros", dtypes=("I32",), shape=zeros)
    group, half = -(-inputs // groups), 1 << (bits - 1)
    order = index and not in_order(checkpoint.read(index), group)
    if order:
        require_groups(checkpoint, index, group, groups)

    def build(
        qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, *g_idx: torch.Tensor
    ) -> torch.Tensor:
        codes = unpack_words(qweight.t(), bits, half)
        words = qzeros + ONES[bits] if less else qzeros
        zero = unpack_words(words, bits, half).float()
        scale = scales.float().t()
        args = (scale, -zero.t() * scale, None, 4 if bits < 8 else 8, [1, group], torch.float32)

        def dense(codes: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = torch.ops.fxlm.dequantize(codes, *args, "none")
            return made

        return unordered(codes, g_idx[0], dense) if g_idx else dense(codes)

    names = tuple(f"{module}.{leaf}" for leaf in ("qweight", "qzeros", "scales"))
    return LogicalTensor(
        name=f"{module}.weight", dtype=torch.float32, shape=(outputs, inputs),
        sources=(*names, index) if order else names, build=build,
    )  # fmt: skip


def _agree(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    module: str,
    bits: int,
    sizes: tuple[int, int],
) -> None:
    """Settings of all layers must be those of the tensors, unless single layers have their own."""
    if config.get("dynamic"):
        return
    if config.get("bits", bits) != bits:
        raise refuse(
            checkpoint,
            f"{module} has {bits}-bit codes, but its quantization says bits={config['bits']!r}",
        )
    inputs, groups = sizes
    size = config.get("group_size")
    if size is not None and groups != num_groups(checkpoint, inputs, size):
        raise refuse(
            checkpoint,
            f"{module}.scales has {groups} groups of {inputs} inputs, but its quantization says "
            f"group_size={size!r}",
        )


def _inputs(
    checkpoint: Checkpoint, config: Mapping[str, Any], module: str, words: int
) -> tuple[int, str]:
    """How many inputs there are, and the tensor that says in which order; empty: as they come."""
    name = f"{module}.g_idx"
    if name in checkpoint.tensors:
        shape = require(checkpoint, name, dtypes=("I32", "I64")).shape
        if len(shape) != 1 or 0 in shape:
            raise refuse(checkpoint, f"{name} has shape {list(shape)}, must be a vector")
        return shape[0], name
    if config.get("desc_act"):
        require(checkpoint, name, dtypes=("I32",), why="desc_act")
    bits = config.get("bits")
    if not isinstance(bits, int) or bits not in BITS:
        raise refuse(checkpoint, f"bits={bits!r} of its quantization; read are {BITS}")
    return words * 32 // bits, ""
