"""How the KV cache lies in memory, in plain PyTorch: what the kernels (csrc/kv_cache.h) agree with.

A cache is one tensor [blocks, heads, block_size, D]; what lies within a block and head, a chunk, is
in an order of its own, that of a matrix [steps, lanes] which products read a step after a step:
keys have a step a dimension and a lane a token, values a step a token and a lane a dimension.

    32 bit   [steps][lanes]
    16 bit   [steps / 2][lanes][2]
     8 bit   [steps / 4][lanes / 4][2][4][2], behind it a float32 scale a token

Types of 8 bits hold codes; their last dimension is D + 4, so that a chunk has room for the scales.
An element is code * scale. Sizes that do not divide leave a chunk in the order of the matrix.

Here: order, codes, reading and writing. Not here: attention (`reference`).
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # of a code
SCALE_BYTES = 4
SMALLEST_SCALE = 2.0**-64  # keeps 1 / scale finite


def is_coded(dtype: torch.dtype) -> bool:
    """Whether a cache of this type holds codes and scales."""
    return dtype in LARGEST


def scale_columns(dtype: torch.dtype) -> int:
    """What the last dimension of a cache is larger than the head: 4 for codes, else 0."""
    return SCALE_BYTES if is_coded(dtype) else 0


def allocate(
    size: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, huge_pages: bool = True
) -> Tensor:
    """Zeros of a cache's size.

    On CPU no page is touched before it is used (``torch.zeros`` touches all), and pages are asked
    to be huge (2 MiB): blocks lie anywhere, so that small ones would miss the TLB time and again.
    """
    nbytes = math.prod(size) * dtype.itemsize
    if device.type != "cpu" or nbytes < HUGE_PAGE:
        return torch.zeros(size, dtype=dtype, device=device)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory has no huge pages
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=private)
    if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: they stay small
            memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -buffer.data_ptr() % HUGE_PAGE
    return buffer[begin : begin + nbytes].view(dtype).view(size)


def order(steps: int, lanes: int, itemsize: int, device: torch.device) -> Tensor:
    """Where element [step, lane] of a chunk lies; int64 [steps, lanes]."""
    place = torch.arange(steps * lanes, device=device)
    if itemsize == 2 and steps % 2 == 0:
        return place.view(steps // 2, lanes, 2).transpose(1, 2).reshape(steps, lanes)
    if itemsize == 1 and steps % 4 == 0 and lanes % 4 == 0:
        units = place.view(steps // 4, lanes // 4, 2, 4, 2)
        return units.permute(0, 2, 4, 1, 3).reshape(steps, lanes)
    return place.view(steps, lanes)


def write(cache: Tensor, new: Tensor, slots: Tensor, *, keys: bool, scale: Tensor | None) -> None:
    """Write the tokens of one step.

    Args:
        cache: [blocks,H,block_size,D], written in place.
        new: [H,T,D].
        slots: [T], block * block_size + offset; -1 = do not write.
        keys: whether it is the cache of keys.
        scale: of codes, float32 with one value or one a head; None: of each token and head.
    """
    used = slots >= 0
    slots, tokens = slots[used], new.transpose(0, 1)[used]  # [N,H,D]
    size, width = cache.shape[2], new.shape[2]
    block, offset = torch.div(slots, size, rounding_mode="floor"), slots % size
    place = _places(cache, width, keys)[offset]  # [N,D]
    heads = torch.arange(cache.shape[1], device=cache.device)
    if not is_coded(cache.dtype):
        chunks = cache.view(cache.shape[0], cache.shape[1], -1)
        chunks[block[:, None, None], heads[:, None], place[:, None]] = tokens.to(cache.dtype)
        return
    codes, scales = quantize(tokens, cache.dtype, scale)
    chunks = cache.view(torch.uint8).view(cache.shape[0], cache.shape[1], -1)
    chunks[block[:, None, None], heads[:, None], place[:, None]] = codes
    _scales(cache, width)[block[:, None], heads, offset[:, None]] = scales


def gather(cache: Tensor, blocks: Tensor, length: int, *, keys: bool) -> Tensor:
    """The first `length` tokens of some blocks: [H,length,D], of floats."""
    heads, size = cache.shape[1], cache.shape[2]
    width = cache.shape[3] - scale_columns(cache.dtype)
    place = _places(cache, width, keys)  # [size,D]
    if is_coded(cache.dtype):
        raw = cache.view(torch.uint8)[blocks].view(len(blocks), heads, -1)
        codes = raw[:, :, place].view(cache.dtype).float()
        found = codes * _scales(cache, width)[blocks][..., None]
    else:
        found = cache[blocks].view(len(blocks), heads, -1)[:, :, place]  # [B,H,size,D]
    return found.transpose(0, 1).reshape(heads, len(blocks) * size, width)[:, :length]


def quantize(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [...,H,D] -> codes, uint8 of the same shape, and float32 scales [...,H].

    A row that is not finite gets a scale of NaN, so that it is not lost.
    """
    x, largest = x.float(), LARGEST[dtype]
    top = x.abs().amax(-1)
    scales = (top / largest).clamp(min=SMALLEST_SCALE)
    if scale is not None:
        scales = scale.float().reshape(-1).expand(x.shape[-2]).expand_as(scales)
    scaled = (x * (1.0 / scales)[..., None]).clamp(-largest, largest)
    scaled = scaled.round() if dtype == torch.int8 else scaled
    finite = torch.isfinite(top)
    codes = torch.where(finite[..., None], scaled, 0.0).to(dtype).view(torch.uint8)
    return codes, torch.where(finite, scales, float("nan"))


def _places(cache: Tensor, width: int, keys: bool) -> Tensor:
    """Where dimension d of the token at an offset lies in a chunk; int64 [block_size,D]."""
    size, itemsize = cache.shape[2], cache.dtype.itemsize
    if keys:
        return order(width, size, itemsize, cache.device).T
    return order(size, width, itemsize, cache.device)


def _scales(cache: Tensor, width: int) -> Tensor:
    """The scales of a coded cache, as a view: float32 [blocks,H,block_size]."""
    blocks, heads, size, _ = cache.shape
    chunks = cache.view(torch.uint8).view(blocks, heads, -1)
    return chunks[:, :, size * width :].view(torch.float32)
