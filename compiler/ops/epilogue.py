"""What linear layers over packed weights have in common: panels, and what follows inside the op.

A panel is `PANEL` outputs of a weight, read as one stream. A ``gated`` weight, gate and up one
after another, has 32 outputs of each half in a panel: place c of panel p is output 32 p + c if
c < 32, else N / 2 + 32 p + c - 32. Whoever has multiplied a panel then has both factors of 32
products, and panels are read in one stream as ever.

An epilogue is what an op does to y [...,n] before rounding it: ``none``; one of `FUNCTIONS`; its
name and ``_and_mul`` for f(y[...,:n/2]) * y[...,n/2:], over a weight that is packed ``gated``. It
sees sums, not their rounding to x's dtype: one rounding less than the ops by themselves make, two
where the result is gated.

Not here: the layouts within a panel (`fxlm.compiler.ops.linear`, `fxlm.compiler.ops.quantized`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn.functional import gelu, pad, relu, silu

PANEL = 64  # outputs a panel
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": relu, "silu": silu, "gelu": gelu, "gelu_tanh": partial(gelu, approximate="tanh"),
}  # fmt: skip
GATED = "_and_mul"
EPILOGUES = ("none", *FUNCTIONS, *(name + GATED for name in FUNCTIONS))


def columns_of(n: int, epilogue: str) -> int:
    """Columns of the result of a layer with ``n`` outputs."""
    assert epilogue in EPILOGUES, epilogue
    return n // 2 if epilogue.endswith(GATED) else n


def apply(y: Tensor, epilogue: str) -> Tensor:
    """The epilogue of y [...,n], in y's dtype."""
    if epilogue == "none":
        return y
    function, columns = FUNCTIONS[epilogue.removesuffix(GATED)], columns_of(y.shape[-1], epilogue)
    if epilogue.endswith(GATED):
        return function(y[..., :columns]) * y[..., columns:]
    return function(y)


def to_panels(rows: Tensor, gated: bool) -> Tensor:
    """[...,N,C] -> [...,ceil(N/64),64,C], zeros behind the last row."""
    parts = 2 if gated else 1
    *experts, outputs, width = rows.shape
    count, wide = outputs // parts, PANEL // parts
    padded = pad(rows.reshape(*experts, parts, count, width), (0, 0, 0, -count % wide))
    panels = padded.view(*experts, parts, -(-count // wide), wide, width)
    return panels.transpose(-4, -3).flatten(-3, -2)


def from_panels(panels: Tensor, outputs: int, gated: bool) -> Tensor:
    """The reverse: [P,64,C] -> [outputs,C]."""
    parts = 2 if gated else 1
    halves = panels.reshape(len(panels), parts, PANEL // parts, panels.shape[-1])
    return halves.transpose(0, 1).flatten(1, 2)[:, : outputs // parts].flatten(0, 1)
