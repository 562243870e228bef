"""lean: the short ways that are taken lead where the long ones do."""

from __future__ import annotations

import sympy
from torch.utils._sympy.functions import FloorDiv

from fxlm.compiler import lower
from fxlm.compiler.lean import lean_alone


def test_an_index_by_a_size_of_two_terms_is_divided_as_ever() -> None:
    row, size = sympy.symbols("d0 s0", integer=True, nonnegative=True)
    rows = sympy.expand(64 * row * (size + 1) + 16 * (size + 1))
    whole = FloorDiv(rows, size + 1)
    assert whole == 64 * row + 16
    with lower._quiet(), lean_alone():
        assert FloorDiv(rows, size + 1) == whole
