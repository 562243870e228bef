"""Quantized weights: the canonical form, how it is made, the packed form and what runs on it.

**Canonical form**, load-time code that any op can use the result of:

    dequantize(codes, scale, offset, table, bits, block, dtype)[n, k]
        = decode(codes[n, k]) * scale[n // rows, k // columns] + offset[n // rows, k // columns]

    codes   [..., N, K], one a byte, 4-bit ones too: int8, or float8_e4m3fn
    bits    8: any code. 4: codes are -8..7, or 0..15 where there is a table
    table   float32 [16]: decode(c) = table[c]; without one decode(c) = c
    block   (rows, columns) that share a scale; 0 is the whole dimension
    scale   float32 [..., ceil(N / rows), ceil(K / columns)]; offset is alike, or None: 0

An integer zero point z is offset = -z * scale. ``activation`` of `dequantize` changes nothing of
its result: it tells whoever fuses a linear layer over it how the inputs may be rounded (``none``
or ``int8``), as the scheme or the checkpoint has it.

**Packed form** of a 2-D weight, what kernels read; `PANEL` outputs are one stream:

    pack_codes, 8 bits   packed[p, s, c, i] = codes[64 p + c, 4 s + i]       [P, ceil(K/4), 64, 4]
    pack_codes, 4 bits   packed[p, s, c, i] = low | high << 4, uint8         [P, ceil(K/8), 64, 4]
                         low = codes[64 p + c, 8 s + i] + 8, high = codes[64 p + c, 8 s + 4 + i] + 8
                         (no + 8 where there is a table: nibbles are 0..15 either way)
    pack_scale           packed[p, g, c] = scale[(64 p + c) // rows, g]      [P, groups, 64]

with zeros past the weight's sizes, P = ceil(N / 64). Four neighbouring inputs of an output lie
together, as VNNI multiplies them; a 4-bit step unpacks by one `and` and one shift into two 8-bit
steps. For 64 p + c of a ``gated`` weight see `fxlm.compiler.ops.epilogue`.

Not here: the kernels (csrc/), which passes place the ops (``fxlm.passes``), the formats of
checkpoints (``fxlm.models.formats``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from fxlm.compiler.ops.epilogue import GATED, PANEL, apply, columns_of, from_panels, to_panels

DEQUANTIZE = (
    "(Tensor codes, Tensor scale, Tensor? offset, Tensor? table, int bits, int[] block, "
    "ScalarType dtype, str activation) -> Tensor"
)
CODE_BOOK = "(Tensor like, str name) -> Tensor"
QUANTIZE_INT = (
    "(Tensor weight, int bits, int group, bool symmetric) -> (Tensor codes, Tensor scale, "
    "Tensor offset)"
)
QUANTIZE_FP8 = "(Tensor weight, int[] block) -> (Tensor codes, Tensor scale)"
PACK_CODES = "(Tensor codes, int bits, bool table, bool gated=False) -> Tensor"
PACK_SCALE = "(Tensor scale, int n, int rows, bool gated=False) -> Tensor"
QUANTIZED_LINEAR = (
    "(Tensor x, Tensor packed, Tensor scale, Tensor? offset, Tensor? table, Tensor? bias, "
    'int n, int bits, int group, str activation, str epilogue="none") -> Tensor'
)
QUANTIZED_ROWS = (
    "(Tensor packed, Tensor scale, Tensor? offset, Tensor? table, Tensor ids, int k, int bits, "
    "int group, ScalarType dtype) -> Tensor"
)

STEP = 4  # neighbouring inputs of one output
ACTIVATIONS = ("none", "int8")
FP8_MAX = 448.0  # of float8_e4m3fn
TILE = 1 << 22  # elements that are widened to float32 at a time

CODE_BOOKS: dict[str, tuple[float, ...]] = {
    # OCP Microscaling Formats v1.0, 5.3.3: FP4 E2M1; the code's high bit is the sign.
    "fp4": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
    # QLoRA (Dettmers et al. 2023), appendix E: quantiles of a normal distribution.
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
}  # fmt: skip


# ---- the canonical form ----------------------------------------------------------------------


def fake_dequantize(
    codes: Tensor, scale: Tensor, offset: Tensor | None, table: Tensor | None, bits: int,
    block: Sequence[int], dtype: torch.dtype, activation: str,
) -> Tensor:  # fmt: skip
    """codes [...,N,K] -> [...,N,K] in ``dtype``, contiguous."""
    _check_canonical(codes, scale, offset, bits, block, activation)
    return codes.new_empty(codes.shape, dtype=dtype)


def _check_canonical(
    codes: Tensor, scale: Tensor, offset: Tensor | None, bits: int, block: Sequence[int],
    activation: str,
) -> None:  # fmt: skip
    groups = [-(-size // (b or size)) for size, b in zip(codes.shape[-2:], block, strict=True)]
    wanted = [*codes.shape[:-2], *groups]
    for part in (scale, scale if offset is None else offset):
        assert list(part.shape) == wanted, (list(part.shape), wanted, list(codes.shape), block)
    assert codes.dtype in (torch.int8, torch.float8_e4m3fn), codes.dtype
    assert bits in (4, 8), bits
    assert activation in ACTIVATIONS, activation


def dequantize(
    codes: Tensor, scale: Tensor, offset: Tensor | None, table: Tensor | None, bits: int,
    block: Sequence[int], dtype: torch.dtype, activation: str,
) -> Tensor:  # fmt: skip
    """The dense weight: computed in float32, rounded once to ``dtype``. See the module."""
    _check_canonical(codes, scale, offset, bits, block, activation)
    if codes.dim() > 2:
        rest = (table, bits, block, dtype, activation)
        offsets: Sequence[Tensor | None] = [None] * len(codes) if offset is None else list(offset)
        parts = zip(codes, scale, offsets, strict=True)
        return torch.stack([dequantize(c, s, o, *rest) for c, s, o in parts])
    outputs, inputs = codes.shape
    rows, columns = block[0] or outputs, block[1] or inputs
    out = codes.new_empty(codes.shape, dtype=dtype)
    for tile in _tiles(outputs, inputs):
        group = torch.arange(tile.start, tile.stop, device=codes.device) // rows
        value = _decode(codes[tile], table) * _spread(scale[group], columns, inputs)
        out[tile] = value if offset is None else value + _spread(offset[group], columns, inputs)
    return out


def _tiles(rows: int, columns: int) -> Iterator[slice]:
    """Slices of the rows, of at most `TILE` elements: widening must not double a large weight."""
    step = max(TILE // max(columns, 1), 1)
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def _decode(codes: Tensor, table: Tensor | None) -> Tensor:
    return codes.float() if table is None else table[codes.int()]


def _spread(groups: Tensor, columns: int, inputs: int) -> Tensor:
    """[N, G] -> [N, inputs] (or [N, 1] for one group): each repeated for its inputs."""
    if groups.shape[-1] == 1:
        return groups
    return groups.repeat_interleave(columns, dim=-1)[:, :inputs]


def fake_code_book(like: Tensor, name: str) -> Tensor:
    """-> float32 [16]."""
    return like.new_empty((len(CODE_BOOKS[name]),), dtype=torch.float32)


def code_book(like: Tensor, name: str) -> Tensor:
    """The table of `CODE_BOOKS` on the device of ``like``."""
    return torch.tensor(CODE_BOOKS[name], dtype=torch.float32, device=like.device)


# ---- from dense weights ----------------------------------------------------------------------


def fake_quantize_int(
    weight: Tensor, bits: int, group: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """weight [N,K] -> int8 [N,K], float32 [N,ceil(K/group)] twice."""
    outputs, inputs = weight.shape
    scale = weight.new_empty((outputs, -(-inputs // (group or inputs))), dtype=torch.float32)
    return weight.new_empty(weight.shape, dtype=torch.int8), scale, torch.empty_like(scale)


def quantize_int(
    weight: Tensor, bits: int, group: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Round to the nearest of 2**bits levels between the extremes of each group.

    Symmetric: the largest magnitude becomes 2**(bits-1) - 1, offset is 0. Otherwise a range that
    holds 0 is spread over all levels, with an integer zero point, so that 0 stays exact.

    Args:
        weight: [N,K].
        bits: 4 or 8.
        group: inputs that share a scale; 0: all.
        symmetric: without zero point.

    Returns:
        codes int8 [N,K], scale and offset float32 [N,ceil(K/group)], block (1, group).
    """
    codes, scale, zero = round_int(weight, bits, group, symmetric)
    return codes, scale, -zero * scale


def round_int(
    weight: Tensor, bits: int, group: int, symmetric: bool, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """As `quantize_int`, with integer zero points in place of offsets.

    Args:
        scale_dtype: scales are rounded to it first and weights against them then, so that a file
            may hold 16-bit scales without a second error.

    Returns:
        codes int8 [N,K]; scale and zero float32 [N,ceil(K/group)]: weight = (codes - zero) * scale.
    """
    codes, scale, zero = fake_quantize_int(weight, bits, group, symmetric)
    for tile in _tiles(*weight.shape):
        parts = _round_tile(weight[tile].float(), bits, group, symmetric, scale_dtype)
        codes[tile], scale[tile], zero[tile] = parts
    return codes, scale, zero


def _round_tile(
    weight: Tensor, bits: int, group: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    outputs, inputs = weight.shape
    size = group or inputs
    grouped = pad(weight, (0, -inputs % size)).view(outputs, -1, size)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    least, most = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if symmetric:
        scale = _nonzero((torch.maximum(-least, most) / high).to(scale_dtype).float())
        zero = torch.zeros_like(scale)
    else:
        scale = _nonzero(((most - least) / (high - low)).to(scale_dtype).float())
        zero = torch.round(low - least / scale).clamp(low, high)
    codes = torch.round(grouped / scale[..., None] + zero[..., None]).clamp(low, high)
    return codes.view(outputs, -1)[:, :inputs].to(torch.int8), scale, zero


def _nonzero(scale: Tensor) -> Tensor:
    """A group of zeros gets scale 1."""
    return torch.where(scale == 0, 1.0, scale)


def fake_quantize_fp8(weight: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor]:
    """weight [N,K] -> float8_e4m3fn [N,K], float32 [ceil(N/rows),ceil(K/columns)]."""
    groups = [-(-size // (b or size)) for size, b in zip(weight.shape, block, strict=True)]
    codes = weight.new_empty(weight.shape, dtype=torch.float8_e4m3fn)
    return codes, weight.new_empty(groups, dtype=torch.float32)


def quantize_fp8(weight: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Round to float8_e4m3fn; the largest magnitude of each block becomes 448.

    Args:
        weight: [N,K].
        block: (rows, columns) that share a scale; 0 is the whole dimension.

    Returns:
        codes float8_e4m3fn [N,K], scale float32 [ceil(N/rows),ceil(K/columns)].
    """
    return round_fp8(weight, block)


def round_fp8(
    weight: Tensor, block: Sequence[int], scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """As `quantize_fp8`, with scales rounded to ``scale_dtype`` first; see `round_int`."""
    codes, scale = fake_quantize_fp8(weight, block)
    outputs, inputs = weight.shape
    rows, columns = block[0] or outputs, block[1] or inputs
    padded = pad(weight, (0, -inputs % columns, 0, -outputs % rows))
    blocks = padded.view(scale.shape[0], rows, scale.shape[1], columns)
    most = blocks.abs().amax((1, 3)).float() / FP8_MAX
    scale.copy_(_nonzero(most.to(scale_dtype).float()))
    for tile in _tiles(outputs, inputs):
        group = torch.arange(tile.start, tile.stop, device=weight.device) // rows
        value = weight[tile].float() / _spread(scale[group], columns, inputs)
        codes[tile] = value.clamp(-FP8_MAX, FP8_MAX).to(codes.dtype)
    return codes, scale


# ---- the packed form -------------------------------------------------------------------------


def fake_pack_codes(codes: Tensor, bits: int, table: bool, gated: bool = False) -> Tensor:
    """codes [N,K] -> [ceil(N/64), ceil(K/(32/bits)), 64, 4]."""
    assert bits == 8 or codes.dtype == torch.int8, (bits, codes.dtype)
    assert not (gated and codes.shape[0] % 2), list(codes.shape)
    outputs, inputs = codes.shape
    per_step = STEP * 8 // bits
    shape = (-(-outputs // PANEL), -(-inputs // per_step), PANEL, STEP)
    return codes.new_empty(shape, dtype=torch.uint8 if bits == 4 else codes.dtype)


def pack_codes(codes: Tensor, bits: int, table: bool, gated: bool = False) -> Tensor:
    """Bring codes [N,K] into panels; see the module for the layout."""
    per_step = STEP * 8 // bits
    raw = codes.view(torch.int8)
    nibbles = raw + 8 if bits == 4 and not table else raw
    panels = to_panels(pad(nibbles, (0, -codes.shape[1] % per_step)), gated)
    steps = panels.view(len(panels), PANEL, -1, per_step).transpose(1, 2).contiguous()
    if bits == 8:
        return steps.view(codes.dtype)
    nibble = steps.view(torch.uint8)
    return nibble[..., :STEP] | nibble[..., STEP:] << 4


def unpack_codes(
    packed: Tensor, outputs: int, inputs: int, bits: int, table: bool, gated: bool = False
) -> Tensor:
    """The codes [N,K] that were packed: int8 or float8_e4m3fn."""
    if bits == 8:
        steps = packed.view(torch.int8)
    else:
        steps = torch.cat([packed & 15, packed >> 4], dim=-1).view(torch.int8)
        steps = steps if table else steps - 8
    codes = from_panels(steps.transpose(1, 2).flatten(2), outputs, gated)[:, :inputs].contiguous()
    return codes.view(packed.dtype) if bits == 8 else codes


def fake_pack_scale(scale: Tensor, n: int, rows: int, gated: bool = False) -> Tensor:
    """scale [ceil(n/rows),G] -> [ceil(n/64),G,64]."""
    return scale.new_empty((-(-n // PANEL), scale.shape[1], PANEL))


def pack_scale(scale: Tensor, n: int, rows: int, gated: bool = False) -> Tensor:
    """Bring scales or offsets into panels, one for each of ``n`` outputs; see the module.

    Args:
        scale: [ceil(n/rows),G].
        n: outputs of the weight.
        rows: outputs that share a scale; 0: all.
        gated: as the codes are packed.
    """
    each = scale[torch.arange(n, device=scale.device) // (rows or n)]
    return to_panels(each, gated).transpose(1, 2).contiguous()


def fake_quantized_linear(
    x: Tensor, packed: Tensor, scale: Tensor, offset: Tensor | None, table: Tensor | None,
    bias: Tensor | None, n: int, bits: int, group: int, activation: str, epilogue: str = "none",
) -> Tensor:  # fmt: skip
    """x [...,K] -> [...,n], [...,n/2] if gated; contiguous."""
    return x.new_empty((*x.shape[:-1], columns_of(n, epilogue)))


def quantized_linear(
    x: Tensor, packed: Tensor, scale: Tensor, offset: Tensor | None, table: Tensor | None,
    bias: Tensor | None, n: int, bits: int, group: int, activation: str, epilogue: str = "none",
) -> Tensor:  # fmt: skip
    """``linear(x, dequantize(...), bias)`` over the packed form, summed in float32 at least.

    Args:
        x: [...,K], any strides.
        packed: of `pack_codes`.
        scale, offset: of `pack_scale`, float32 [ceil(n/64), ceil(K/group), 64].
        table: float32 [16] or None.
        bias: [n] or None.
        n: outputs.
        bits: 4 or 8, of a code.
        group: inputs that share a scale; 0: all.
        activation: ``none``: x as it is (the CPU kernels keep 16 bits of it, 24 of float32, by
            segments: csrc/quantized.cpp); ``int8``: each row of x rounded by `round_rows`.
        epilogue: what is done to y [...,n]: `fxlm.compiler.ops.epilogue`.

    Returns:
        [...,n] in x's dtype, [...,n/2] if gated; contiguous.
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(exact)
    if activation == "int8":
        codes, row_scale = round_rows(wide)
        wide = codes * row_scale
    gated = epilogue.endswith(GATED)
    weight = _unpack(packed, scale, offset, table, n, x.shape[-1], bits, group, gated).to(exact)
    y = linear(wide, weight, None if bias is None else bias.to(exact))
    return apply(y, epilogue).to(x.dtype).contiguous()


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per token: codes -127..127 in x's dtype, scale [...,1]; x = codes * scale."""
    scale = x.abs().amax(-1, keepdim=True) / 127.0
    return torch.round(x / _nonzero(scale)), _nonzero(scale)


def _unpack(
    packed: Tensor, scale: Tensor, offset: Tensor | None, table: Tensor | None, outputs: int,
    inputs: int, bits: int, group: int, gated: bool,
) -> Tensor:  # fmt: skip
    """The weight [outputs,inputs] in float32."""
    codes = unpack_codes(packed, outputs, inputs, bits, table is not None, gated)
    each = from_panels(scale.transpose(1, 2), outputs, gated)
    shift = None if offset is None else from_panels(offset.transpose(1, 2), outputs, gated)
    return dequantize(codes, each, shift, table, bits, (1, group), torch.float32, "none")


def fake_quantized_rows(
    packed: Tensor, scale: Tensor, offset: Tensor | None, table: Tensor | None, ids: Tensor,
    k: int, bits: int, group: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """ids [...] -> [...,k], contiguous."""
    return packed.new_empty((*ids.shape, k), dtype=dtype)


def quantized_rows(
    packed: Tensor, scale: Tensor, offset: Tensor | None, table: Tensor | None, ids: Tensor,
    k: int, bits: int, group: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Rows of a packed weight: ``embedding(dequantize(...), ids)``.

    Args:
        packed, scale, offset, table, bits, group: as in `quantized_linear`.
        ids: integers below N, any shape.
        k: inputs of the weight.
        dtype: of the result.

    Returns:
        [*ids.shape,k], contiguous.
    """
    flat = ids.flatten().long()
    panel, column = torch.div(flat, PANEL, rounding_mode="floor"), flat % PANEL
    codes = packed[panel, :, column]  # [rows, steps, 4]
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], dim=-1).view(torch.int8)
        codes = codes if table is not None else codes - 8
    each = scale[panel, :, column]
    shift = None if offset is None else offset[panel, :, column]
    codes = codes.flatten(1)[:, :k]
    dense = dequantize(codes, each, shift, table, bits, (1, group), dtype, "none")
    return dense.view(*ids.shape, k)
