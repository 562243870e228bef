"""MXFP4 experts: equal to transformers' own conversion, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxlm.compiler.errors import InvalidModel
from tests.models.formats.reading import read, write

NAME = "model.layers.0.mlp.experts.gate_up_proj"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (3, 20, 2)
    return {
        f"{NAME}_blocks": torch.randint(0, 256, (*shape, 16), generator=generator).byte(),
        f"{NAME}_scales": torch.randint(110, 135, shape, generator=generator).byte(),
    }


def test_equals_transformers(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    raw = tensors()
    found = read(write(tmp_path, raw, quant_method="mxfp4"), NAME)
    expected = convert_moe_packed_tensors(*raw.values(), dtype=torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_scales_of_another_shape_are_refused(tmp_path: Path) -> None:
    raw = tensors()
    raw[f"{NAME}_scales"] = raw[f"{NAME}_scales"][:, :10].contiguous()
    with pytest.raises(InvalidModel, match=r"shape \[3, 10, 2\], must be \[3, 20, 2\]"):
        read(write(tmp_path, raw, quant_method="mxfp4"), NAME)


def test_blocks_of_another_size_are_refused(tmp_path: Path) -> None:
    raw = tensors()
    raw[f"{NAME}_blocks"] = raw[f"{NAME}_blocks"][..., :8].contiguous()
    with pytest.raises(InvalidModel, match=r"must be \[3, 20, 2, 16\]"):
        read(write(tmp_path, raw, quant_method="mxfp4"), NAME)
