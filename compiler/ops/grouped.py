"""fxlm::grouped_linear: one linear layer per group of rows (mixture of experts).

Here: schema, fake and the PyTorch reference, which also is what runs on any device until a
faster kernel is registered. Not here: routing and sorting (`fxlm.models.experts`).
"""

from __future__ import annotations

import torch

SCHEMA = "grouped_linear(Tensor x, Tensor weight, Tensor offsets) -> Tensor"

_library = torch.library.Library("fxlm", "FRAGMENT")
_library.define(SCHEMA)


def reference(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Multiply every row of ``x`` with the weight of its group.

    Args:
        x: [S, I]; rows sorted by group.
        weight: [E, O, I], any strides (a transposed view is fine).
        offsets: int32 or int64 [E]; end of each group in ``x`` (prefix sums of the sizes), so
            that group e owns rows offsets[e-1]..offsets[e]. Rows past offsets[-1] give 0.

    Returns:
        [S, O] in the dtype of ``x``. Groups without rows are never read.
    """
    out = x.new_zeros(x.shape[0], weight.shape[1])
    start = 0
    for group, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(x[start:end], weight[group].t(), out=out[start:end])
            start = end
    return out


def _fake(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    torch._check(x.dim() == 2 and weight.dim() == 3 and offsets.dim() == 1)
    torch._check(weight.shape[2] == x.shape[1])
    torch._check(offsets.shape[0] == weight.shape[0])
    return x.new_empty(x.shape[0], weight.shape[1])


_library.impl("grouped_linear", reference, "CompositeExplicitAutograd")
torch.library.register_fake("fxlm::grouped_linear", _fake, lib=_library)
