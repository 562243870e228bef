"""Linear layers over packed weights: layout, shapes, and the ops in plain PyTorch.

A packed weight is a dense tensor [panels, steps, 64, per_step] of the weight's own dtype:

    packed[p, s, c, i] = weight[64 p + c, per_step s + i]       zero beyond the weight's sizes

so that 64 outputs (a panel) are one sequential stream. Experts [E,N,K] are E of them in a row. For
64 p + c of a ``gated`` weight see `fxlm.compiler.ops.epilogue`.
``per_step`` is 2 for bfloat16 (the pairs that AVX512-BF16 and AMX multiply) and 1 otherwise. Not
here: the kernels (csrc/linear.cpp, csrc/linear_tiles.cpp) and the pass that places the ops
(``fxlm.passes.pack_linears``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxlm.compiler.ops.epilogue import GATED, PANEL, apply, columns_of, from_panels, to_panels

PACK_WEIGHT = "(Tensor weight, bool gated=False) -> Tensor"
PACKED_LINEAR = '(Tensor x, Tensor packed, Tensor? bias, int n, str epilogue="none") -> Tensor'
PACKED_GROUPED = "(Tensor x, Tensor packed, Tensor offsets, int n) -> Tensor"
PACKED_ROWS = "(Tensor packed, Tensor ids, int k) -> Tensor"


def inputs_per_step(dtype: torch.dtype) -> int:
    """Neighbouring inputs of one output that lie together."""
    return 2 if dtype == torch.bfloat16 else 1


def fake_pack_weight(weight: Tensor, gated: bool = False) -> Tensor:
    """weight [...,N,K] -> [..., ceil(N/64), ceil(K/per_step), 64, per_step]."""
    *experts, outputs, inputs = weight.shape
    assert not (gated and outputs % 2), list(weight.shape)
    step = inputs_per_step(weight.dtype)
    return weight.new_empty((*experts, -(-outputs // PANEL), -(-inputs // step), PANEL, step))


def fake_packed_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, n: int, epilogue: str = "none"
) -> Tensor:
    """x [...,K] -> [...,n], [...,n/2] if gated; contiguous."""
    return x.new_empty((*x.shape[:-1], columns_of(n, epilogue)))


def fake_packed_grouped(x: Tensor, packed: Tensor, offsets: Tensor, n: int) -> Tensor:
    """x [S,K] -> [S,n], contiguous."""
    return x.new_empty((x.shape[0], n))


def fake_packed_rows(packed: Tensor, ids: Tensor, k: int) -> Tensor:
    """ids [...] -> [...,k], contiguous."""
    return packed.new_empty((*ids.shape, k))


def pack_weight(weight: Tensor, gated: bool = False) -> Tensor:
    """Bring a weight [N,K], or experts [E,N,K], of any strides into panels; the layout is above."""
    step, inputs = inputs_per_step(weight.dtype), weight.shape[-1]
    padded = torch.nn.functional.pad(weight, (0, -inputs % step))
    panels = to_panels(padded, gated)
    steps = panels.view(*panels.shape[:-1], -(-inputs // step), step)
    return steps.transpose(-3, -2).contiguous()


def unpack_weight(packed: Tensor, outputs: int, inputs: int, gated: bool = False) -> Tensor:
    """The weight [N,K] that was packed."""
    return from_panels(packed.transpose(1, 2).flatten(2), outputs, gated)[:, :inputs]


def packed_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, n: int, epilogue: str = "none"
) -> Tensor:
    """``linear(x, weight, bias)``, summed in float32 at least.

    Args:
        x: [...,K], any strides.
        packed: of a weight [n,K].
        bias: [n] or None.
        n: outputs.
        epilogue: what is done to y [...,n]: `fxlm.compiler.ops.epilogue`.

    Returns:
        [...,n] in x's dtype, [...,n/2] if gated; contiguous.
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = unpack_weight(packed, n, x.shape[-1], epilogue.endswith(GATED)).to(exact)
    wide = None if bias is None else bias.to(exact)
    y = torch.nn.functional.linear(x.to(exact), weight, wide)
    return apply(y, epilogue).to(x.dtype).contiguous()


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
