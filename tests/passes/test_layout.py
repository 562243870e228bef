"""layout: where a split dimension is after a view."""

from __future__ import annotations

import pytest

from fxlm.passes.layout import ANY_SIZE, viewed_dim


@pytest.mark.parametrize(
    ("before", "after", "dim", "parts", "expected"),
    [
        ((1, ANY_SIZE, 64), (1, ANY_SIZE, 4, 16), 2, 2, 2),  # features become heads
        ((1, ANY_SIZE, 4, 16), (1, ANY_SIZE, 64), 2, 4, 2),  # and back
        ((1, ANY_SIZE, 64), (ANY_SIZE, 64), 2, 2, 1),
        ((ANY_SIZE, 96), (1, ANY_SIZE, 96), 1, 3, 2),
        ((1, ANY_SIZE, 64), (1, ANY_SIZE, 4, 16), 2, 8, None),  # half a head
        ((1, ANY_SIZE, 4, 16), (1, ANY_SIZE, 64), 3, 2, None),  # half of every head
    ],
)
def test_a_split_after_a_view(
    before: tuple[int, ...], after: tuple[int, ...], dim: int, parts: int, expected: int | None
) -> None:
    assert viewed_dim(before, after, dim, parts) == expected
