"""Blocks of GGUF tensors, and their names.

Tensors come as bytes [..., N, bytes of a row] (`fxlm.models.gguf_file`). A row is blocks of 32
values (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0) or 256 (Q2_K to Q6_K: groups of 16 or 32 with scales of
their own); value = scale * code + offset. Which byte holds what is in ggml's ``ggml-common.h`` and
``ggml-quants.c``; gguf-py's numpy dequantizer is what the tests compare with.

The names of tensors, and what a converter did to their rows, are in `fxlm.models.gguf_names`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from fxlm.compiler import ops
from fxlm.models.formats import LogicalTensor, refuse
from fxlm.models.gguf_file import GgufTensor
from fxlm.models.gguf_names import Place, places

if TYPE_CHECKING:
    from fxlm.models.checkpoint import Checkpoint

Tensor = torch.Tensor
# Codes int8 [..., K], scale and offset float32 [..., K / group]; bits of a code.
Parts = tuple[Tensor, Tensor, Tensor | None, int]
HALF = 8  # taken off 4-bit codes, so that they are -8..7


def read(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, LogicalTensor]:
    """The dense tensors under the names of the Hugging Face model; see `fxlm.models.formats`.

    Raises:
        InvalidModel: a tensor that this architecture does not have, or of no GGUF file.
    """
    ops.load()
    made = {}
    for name, info in checkpoint.tensors.items():
        if not isinstance(info, GgufTensor):
            raise refuse(checkpoint, f"its quantization is gguf, but {name!r} is in no GGUF file")
        for place in places(checkpoint, name, info.dense_shape):
            made[place.name] = _logical(name, info, place)
    return made


def _logical(name: str, info: GgufTensor, place: Place) -> LogicalTensor:
    decode = DECODERS.get(info.dtype)

    def build(raw: Tensor) -> Tensor:
        rows = place.rows(raw)
        return place.values(rows if decode is None else _dense(rows, decode))

    dtype = info.torch_dtype if decode is None else torch.float32
    return LogicalTensor(
        name=place.name, dtype=dtype, shape=place.shape, sources=(name,), build=build
    )


def _dense(raw: Tensor, decode: Callable[[Tensor], Parts]) -> Tensor:
    codes, scale, offset, bits = decode(raw)
    group = codes.shape[-1] // scale.shape[-1]
    made: Tensor = torch.ops.fxlm.dequantize(
        codes, scale, offset, None, bits, [1, group], torch.float32, "none"
    )
    return made


# ---- blocks ----------------------------------------------------------------------------------


def _blocks(raw: Tensor, width: int) -> Tensor:
    """bytes [..., R] -> [..., blocks, width]."""
    blocks: Tensor = raw.unflatten(-1, (-1, width))
    return blocks


def _half(block: Tensor, begin: int) -> Tensor:
    """The float16 at a byte of each block, as float32 [..., blocks, 1]."""
    return block[..., begin : begin + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """bytes [..., M] -> [..., 2, M]: low ones first."""
    return torch.stack([packed & 15, packed >> 4], dim=-2)


def _flat(codes: Tensor, minus: int = 0) -> Tensor:
    """Codes [..., blocks, values of a block] -> int8 [..., K], less a number."""
    return (codes.to(torch.int8) - minus).flatten(-2)


def q8_0(raw: Tensor) -> Parts:
    """A float16 scale, 32 signed bytes."""
    block = _blocks(raw, 34)
    codes = block[..., 2:].contiguous().view(torch.int8)
    return codes.flatten(-2), _half(block, 0).flatten(-2), None, 8


def q4_0(raw: Tensor) -> Parts:
    """A float16 scale, 32 nibbles: the low ones are the first 16 values."""
    block = _blocks(raw, 18)
    codes = _nibbles(block[..., 2:]).flatten(-2)
    return _flat(codes, HALF), _half(block, 0).flatten(-2), None, 4


def q4_1(raw: Tensor) -> Parts:
    """Scale and minimum, 32 nibbles."""
    block = _blocks(raw, 20)
    scale, least = (_half(block, begin).flatten(-2) for begin in (0, 2))
    return _flat(_nibbles(block[..., 4:]).flatten(-2), HALF), scale, least + HALF * scale, 4


def _fifth_bits(word: Tensor) -> Tensor:
    """4 bytes [..., 4] -> bit i of them for value i, as 16 or 0, [..., 32]."""
    return torch.stack([word >> i & 1 for i in range(8)], dim=-1).flatten(-2) << 4


def q5_0(raw: Tensor) -> Parts:
    """A float16 scale, the fifth bits, 32 nibbles; codes are less 16."""
    block = _blocks(raw, 22)
    codes = _nibbles(block[..., 6:]).flatten(-2) | _fifth_bits(block[..., 2:6])
    return _flat(codes, 16), _half(block, 0).flatten(-2), None, 8


def q5_1(raw: Tensor) -> Parts:
    """Scale and minimum, the fifth bits, 32 nibbles."""
    block = _blocks(raw, 24)
    codes = _nibbles(block[..., 8:]).flatten(-2) | _fifth_bits(block[..., 4:8])
    scale, least = (_half(block, begin).flatten(-2) for begin in (0, 2))
    return _flat(codes), scale, least, 8


def _pairs(packed: Tensor) -> Tensor:
    """64 bytes of 2-bit codes [..., 64] -> [..., 2, 4, 32]: halves, then shifts, then bytes."""
    half = packed.unflatten(-1, (2, 32))
    return torch.stack([half >> shift & 3 for shift in (0, 2, 4, 6)], dim=-2)


def q2_k(raw: Tensor) -> Parts:
    """16 bytes of scale and minimum (4 bits each), 2-bit codes, two float16 above them."""
    block = _blocks(raw, 84)
    packed = block[..., :16]
    scale = _half(block, 80) * (packed & 15).float()
    least = _half(block, 82) * (packed >> 4).float()
    return _flat(_pairs(block[..., 16:80]).flatten(-3)), scale.flatten(-2), -least.flatten(-2), 4


def q3_k(raw: Tensor) -> Parts:
    """Third bits, 2-bit codes, 16 scales of 6 bits in 12 bytes, a float16 above them."""
    block = _blocks(raw, 110)
    high = torch.stack([block[..., :32] >> i & 1 for i in range(8)], dim=-2)
    codes = _pairs(block[..., 32:96]).flatten(-3, -2) | high << 2
    packed = block[..., 96:108]
    low = _nibbles(packed[..., :8]).flatten(-2)
    top = torch.stack([packed[..., 8:] >> shift & 3 for shift in (0, 2, 4, 6)], dim=-2).flatten(-2)
    scale = _half(block, 108) * ((low | top << 4).float() - 32)
    return _flat(codes.flatten(-2), 4), scale.flatten(-2), None, 4


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes -> 8 scales and 8 minima of 6 bits, float32."""
    first, second, third = (packed[..., i : i + 4] for i in (0, 4, 8))
    scale = torch.cat([first & 63, (third & 15) | (first >> 6) << 4], dim=-1)
    least = torch.cat([second & 63, third >> 4 | (second >> 6) << 4], dim=-1)
    return scale.float(), least.float()


def q4_k(raw: Tensor) -> Parts:
    """Two float16, 8 scales and minima, 256 nibbles in 4 runs of 32 bytes."""
    block = _blocks(raw, 144)
    scale, least = _scales_and_minima(block[..., 4:16])
    scale, least = _half(block, 0) * scale, _half(block, 2) * least
    codes = _nibbles(block[..., 16:].unflatten(-1, (4, 32))).flatten(-3)
    offset = HALF * scale - least
    return _flat(codes, HALF), scale.flatten(-2), offset.flatten(-2), 4


def q5_k(raw: Tensor) -> Parts:
    """As Q4_K, with 32 bytes whose bit g is the fifth bit of the values of group g."""
    block = _blocks(raw, 176)
    scale, least = _scales_and_minima(block[..., 4:16])
    scale, least = _half(block, 0) * scale, _half(block, 2) * least
    fifth = torch.stack([block[..., 16:48] >> g & 1 for g in range(8)], dim=-2) << 4
    codes = _nibbles(block[..., 48:].unflatten(-1, (4, 32))).flatten(-3, -2) | fifth
    return _flat(codes.flatten(-2)), scale.flatten(-2), -least.flatten(-2), 8


def q6_k(raw: Tensor) -> Parts:
    """Low nibbles, upper pairs of bits, 16 signed bytes of scales, a float16 above them."""
    block = _blocks(raw, 210)
    low = _nibbles(block[..., :128].unflatten(-1, (2, 64))).unflatten(-1, (2, 32)).flatten(-3, -2)
    codes = low | _pairs(block[..., 128:192]) << 4
    scale = block[..., 192:208].contiguous().view(torch.int8).float() * _half(block, 208)
    return _flat(codes.flatten(-3), 32), scale.flatten(-2), None, 8


DECODERS: dict[str, Callable[[Tensor], Parts]] = {
    "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0, "Q2_K": q2_k,
    "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k,
}  # fmt: skip
