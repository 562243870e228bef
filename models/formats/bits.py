"""Codes packed into 32-bit words, as several formats have them.

Plain tensor code that runs on real, meta and traced tensors.
"""

from __future__ import annotations

import torch


def unpack_words(words: torch.Tensor, bits: int, minus: int = 0) -> torch.Tensor:
    """Unpack int32 words along the last dimension, lowest bits first.

    Args:
        words: int32 [..., W].
        bits: of a code; divides 32.
        minus: subtracted from each code, which is 0..2**bits - 1 otherwise; must leave an int8.

    Returns:
        int8 [..., W * 32 / bits].
    """
    assert 32 % bits == 0, bits
    mask = (1 << bits) - 1
    parts = [((words >> shift & mask) - minus).to(torch.int8) for shift in range(0, 32, bits)]
    return torch.stack(parts, dim=-1).flatten(-2)
