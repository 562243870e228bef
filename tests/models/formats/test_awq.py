"""AWQ checkpoints: equal to what the format's own library unpacks, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fxlm.compiler.errors import InvalidModel
from tests.models.formats.reading import golden, read, write

SETTINGS: dict[str, Any] = {"quant_method": "awq", "bits": 4, "version": "gemm"}


@pytest.mark.parametrize("case", ["g32", "g128"])
def test_equals_the_library(case: str, tmp_path: Path) -> None:
    tensors, expected = golden("awq.safetensors", case)
    found = read(write(tmp_path, tensors, **SETTINGS), "m.weight")
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4)  # it multiplies in float16


def test_without_zero_points_codes_are_symmetric(tmp_path: Path) -> None:
    tensors, _ = golden("awq.safetensors", "g32")
    del tensors["m.qzeros"]
    found = read(write(tmp_path, tensors, **SETTINGS), "m.weight")
    eights = torch.full((4, 8), int.from_bytes(b"\x88" * 4, "little", signed=True))
    same = read(write(tmp_path, tensors | {"m.qzeros": eights.int()}, **SETTINGS), "m.weight")
    torch.testing.assert_close(found, same)


def test_the_gemv_version_is_refused(tmp_path: Path) -> None:
    tensors, _ = golden("awq.safetensors", "g32")
    with pytest.raises(InvalidModel, match="AWQ version 'gemv'"):
        read(write(tmp_path, tensors, **{**SETTINGS, "version": "GEMV"}), "m.weight")


def test_scales_of_another_shape_are_refused(tmp_path: Path) -> None:
    tensors, _ = golden("awq.safetensors", "g32")
    tensors["m.scales"] = tensors["m.scales"][:, :32].contiguous()
    with pytest.raises(InvalidModel, match=r"'m.scales'.* shape \[4, 32\], must be \[4, 64\]"):
        read(write(tmp_path, tensors, **SETTINGS), "m.weight")


def test_missing_zero_points_are_refused_where_the_settings_have_them(tmp_path: Path) -> None:
    tensors, _ = golden("awq.safetensors", "g32")
    del tensors["m.qzeros"]
    with pytest.raises(InvalidModel, match=r"lacks tensor 'm.qzeros' \(zero_point: true\)"):
        read(write(tmp_path, tensors, **SETTINGS, zero_point=True), "m.weight")


@pytest.mark.parametrize(("case", "size"), [("g32", 128), ("g32", -1), ("g128", 32)])
def test_another_group_size_than_that_of_the_tensors_is_refused(
    case: str, size: int, tmp_path: Path
) -> None:
    tensors, _ = golden("awq.safetensors", case)
    with pytest.raises(InvalidModel, match=rf"'m.scales'.* must be .*group_size {size}, "):
        read(write(tmp_path, tensors, **SETTINGS, group_size=size), "m.weight")
