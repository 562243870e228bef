"""Linear layers over packed weights: layout, shapes, and the ops in plain PyTorch.

A packed weight is a dense tensor [panels, steps, 64, per_step] of the weight's own dtype:

    packed[p, s, c, i] = weight[64 p + c, per_step s + i]       zero beyond the weight's sizes

so that 64 outputs (a panel) are one sequential stream. Experts [E,N,K] are E of them in a row.
``per_step`` is 2 for bfloat16 (the pairs that AVX512-BF16 and AMX multiply) and 1 otherwise. Not
here: the kernels (csrc/linear.cpp, csrc/linear_tiles.cpp) and the pass that places the ops
(``fxlm.passes.pack_linears``).
"""

from __future__ import annotations

import torch
from torch import Tensor

PACK_WEIGHT = "(Tensor weight) -> Tensor"
PACKED_LINEAR = "(Tensor x, Tensor packed, Tensor? bias, int n) -> Tensor"
PACKED_GROUPED = "(Tensor x, Tensor packed, Tensor offsets, int n) -> Tensor"
PACKED_ROWS = "(Tensor packed, Tensor ids, int k) -> Tensor"

PANEL = 64  # outputs a panel


def inputs_per_step(dtype: torch.dtype) -> int:
    """Neighbouring inputs of one output that lie together."""
    return 2 if dtype == torch.bfloat16 else 1


def fake_pack_weight(weight: Tensor) -> Tensor:
    """weight [...,N,K] -> [..., ceil(N/64), ceil(K/per_step), 64, per_step]."""
    *experts, outputs, inputs = weight.shape
    step = inputs_per_step(weight.dtype)
    return weight.new_empty((*experts, -(-outputs // PANEL), -(-inputs // step), PANEL, step))


def fake_packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """x [...,K] -> [...,n], contiguous."""
    return x.new_empty((*x.shape[:-1], n))


def fake_packed_grouped(x: Tensor, packed: Tensor, offsets: Tensor, n: int) -> Tensor:
    """x [S,K] -> [S,n], contiguous."""
    return x.new_empty((x.shape[0], n))


def fake_packed_rows(packed: Tensor, ids: Tensor, k: int) -> Tensor:
    """ids [...] -> [...,k], contiguous."""
    return packed.new_empty((*ids.shape, k))


def pack_weight(weight: Tensor) -> Tensor:
    """Bring a weight [N,K], or experts [E,N,K], of any strides into panels; the layout is above."""
    *experts, outputs, inputs = weight.shape
    step = inputs_per_step(weight.dtype)
    missing = (0, -inputs % step, 0, -outputs % PANEL)
    padded = torch.nn.functional.pad(weight, missing)
    panels = padded.reshape(*experts, -(-outputs // PANEL), PANEL, -(-inputs // step), step)
    return panels.transpose(-3, -2).contiguous()


def unpack_weight(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """The weight [N,K] that was packed."""
    panels, steps, columns, step = packed.shape
    whole = packed.transpose(1, 2).reshape(panels * columns, steps * step)
    return whole[:outputs, :inputs]


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """``linear(x, weight, bias)``, summed in float32 at least.

    Args:
        x: [...,K], any strides.
        packed: of a weight [n,K].
        bias: [n] or None.
        n: outputs.

    Returns:
        [...,n] in x's dtype, contiguous.
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = unpack_weight(packed, n, x.shape[-1]).to(exact)
    wide = None if bias is None else bias.to(exact)
    return torch.nn.functional.linear(x.to(exact), weight, wide).to(x.dtype).contiguous()


def packed_grouped(x: Tensor, packed: Tensor, offsets: Tensor, n: int) -> Tensor:
    """``grouped_linear`` over packed experts: every row with the weight of its group.

    Args:
        x: [S,K], any strides; rows sorted by group.
        packed: of experts [E,n,K].
        offsets: int32 or int64 [E]; end of each group in x. Rows past the last give 0.
        n: outputs.

    Returns:
        [S,n] in x's dtype, contiguous. Groups without rows are never read.
    """
    out, start = x.new_zeros(x.shape[0], n), 0
    for group, end in enumerate(offsets.tolist()):
        if end > start:
            out[start:end] = packed_linear(x[start:end], packed[group], None, n)
            start = end
    return out


def packed_rows(packed: Tensor, ids: Tensor, k: int) -> Tensor:
    """Rows of the weight that was packed: ``embedding(weight, ids)``.

    Args:
        packed: of a weight [N,k].
        ids: integers below N, any shape.
        k: inputs of the weight.

    Returns:
        [*ids.shape,k], contiguous.
    """
    panels = torch.div(ids, PANEL, rounding_mode="floor")
    rows = packed[panels, :, ids % PANEL]  # [*ids.shape, steps, per_step]
    return rows.flatten(-2)[..., :k].contiguous()
