"""Codes packed into 32-bit words, and inputs out of order, as several formats have them.

Unpacking is plain tensor code that runs on real, meta and traced tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from fxlm.compiler.errors import InvalidModel

if TYPE_CHECKING:
    from fxlm.models.checkpoint import Checkpoint


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


def in_order(groups: torch.Tensor, size: int) -> bool:
    """Whether the groups of inputs, int [K], are 0…0 1…1 …, ``size`` of each."""
    return bool((groups == torch.arange(len(groups)) // size).all())


def require_groups(checkpoint: Checkpoint, name: str, size: int, count: int) -> None:
    """Refuse groups of inputs that are not ``count`` groups of ``size`` (the last: what is left).

    Args:
        name: of the tensor, int [K].

    Raises:
        InvalidModel: a group that does not exist, or of another size.
    """
    groups = checkpoint.read(name).to(torch.int64)
    least, most = int(groups.min()), int(groups.max())
    if least < 0 or most >= count:
        raise InvalidModel(
            f"tensor {name!r} of {checkpoint.path} has groups {least} to {most}, but there are "
            f"{count} groups of scales; download the checkpoint again"
        )
    sizes = torch.bincount(groups, minlength=count)
    if bool((sizes[:-1] != size).any()):
        group = int((sizes[:-1] != size).nonzero()[0])
        raise InvalidModel(
            f"tensor {name!r} of {checkpoint.path} puts {int(sizes[group])} inputs into group "
            f"{group}, must be {size}; download the checkpoint again"
        )


def unordered(
    codes: torch.Tensor, groups: torch.Tensor, dequantize: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Dequantize codes [N, K] with inputs sorted by group, then put them back.

    Args:
        codes: columns as the model has them.
        groups: int [K], the group of each column; all of one size.
        dequantize: from sorted codes to values.
    """
    order = torch.argsort(groups, stable=True)
    return dequantize(codes.index_select(1, order)).index_select(1, torch.argsort(order))


def pack_words(codes: torch.Tensor, bits: int, plus: int) -> torch.Tensor:
    """The reverse of `unpack_words`: int8 [..., K] -> int32 [..., ceil(K * bits / 32)].

    Args:
        plus: added to each code, which must give 0..2**bits - 1.
    """
    per_word = 32 // bits
    unsigned = torch.nn.functional.pad(
        codes.to(torch.int64) + plus, (0, -codes.shape[-1] % per_word)
    )
    parts = unsigned.unflatten(-1, (-1, per_word))
    shifts = torch.arange(0, 32, bits)
    words = (parts << shifts).sum(-1)  # 0..2**32 - 1
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
