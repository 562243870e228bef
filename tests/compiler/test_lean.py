"""lean: the short ways that are taken lead where the long ones do."""

from __future__ import annotations

import sympy
from torch._inductor import sizevars
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from fxlm.compiler import lower
from fxlm.compiler.lean import lean_alone

x, row, size = sympy.symbols("d1 d0 s0", integer=True, nonnegative=True)


def test_strides_are_those_that_sympy_simplifies_to() -> None:
    """Of a rotary embedding's halves, of heads, of a size that changes."""
    indices = [
        x + 64 * row, 3 * x + size * row, 64 * FloorDiv(x, 64) + ModularIndexing(x, 1, 64),
        128 * row + ModularIndexing(x + 32, 1, 64), (x + row) * size, FloorDiv(x, 16) + 7,
    ]  # fmt: skip

    def strides() -> list[sympy.Expr]:
        for cached in (
            sizevars.stride_at, sizevars.simplify_index_in_vec_range, sizevars.stride_at_vec_range
        ):  # fmt: skip
            cached.cache_clear()
        return [sizevars.stride_at_vec_range(index, x, 16) for index in indices]

    whole = strides()
    with lower._quiet(), lean_alone():
        assert strides() == whole
