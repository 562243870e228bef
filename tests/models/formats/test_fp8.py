"""float8 checkpoints: the three layouts of scales, as transformers dequantizes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fxlm.compiler.errors import InvalidModel
from tests.models.formats.reading import read, write

N, K = 48, 80


def codes(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * 50).to(torch.float8_e4m3fn)


def oracle(weight: torch.Tensor, scale: torch.Tensor, block: list[int] | None) -> torch.Tensor:
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    return _dequantize_fp8_weight(weight, scale, block, torch.float32)  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", [(N, K), (3, N, K)])
def test_blocks(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight, scale = codes(*shape), torch.rand(*shape[:-2], 3, 3)
    tensors = {"m.weight": weight, "m.weight_scale_inv": scale}
    path = write(tmp_path, tensors, quant_method="fp8", weight_block_size=[16, 32])
    torch.testing.assert_close(read(path, "m.weight"), oracle(weight, scale, [16, 32]))


@pytest.mark.parametrize("shape", [(N, 1), (N,), (1,), ()])
@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8"])
def test_scales_by_output_or_one(method: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    weight, scale = codes(N, K), torch.rand(shape)
    tensors = {"m.weight": weight, "m.weight_scale": scale}
    wide = scale.view(-1, 1)
    found = read(write(tmp_path, tensors, quant_method=method), "m.weight")
    torch.testing.assert_close(found, oracle(weight, wide, None))


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    weight = codes(N, K)
    scale = torch.tensor([[0.5, 2.0, 1.0]]).expand(3, 3).contiguous()
    tensors = {"m.weight": weight, "m.weight_scale_inv": scale.to(torch.float8_e8m0fnu)}
    path = write(tmp_path, tensors, quant_method="fp8", weight_block_size=[16, 32])
    torch.testing.assert_close(read(path, "m.weight"), oracle(weight, scale, [16, 32]))


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({}, {}, "lacks tensor 'm.weight_scale'"),
        (
            {"m.weight_scale_inv": torch.ones(2, 3)},
            {"weight_block_size": [16, 32]},
            r"has shape \[2, 3\], must be \[3, 3\]",
        ),
        ({"m.weight_scale": torch.ones(1)}, {"fmt": "e5m2"}, "fp8 of format 'e5m2'"),
        ({}, {"quantization": "FP8"}, "quantization is 'FP8', must be an object"),
        ({}, {"weight_block_size": 128}, "weight_block_size=128; must be two counts"),
        ({}, {"weight_block_size": [128]}, r"weight_block_size=\[128\]; must be two counts"),
        ({}, {"weight_block_size": [0, 128]}, r"weight_block_size=\[0, 128\]; must be two counts"),
    ],
)
def test_what_does_not_fit_is_refused(
    tensors: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, {"m.weight": codes(N, K), **tensors}, quant_method="fp8", **settings)
    with pytest.raises(InvalidModel, match=message):
        read(path, "m.weight")


def test_other_algorithms_of_modelopt_are_refused(tmp_path: Path) -> None:
    tensors = {"m.weight": codes(N, K), "m.weight_scale": torch.ones(1)}
    path = write(tmp_path, tensors, quant_method="modelopt", quantization={"quant_algo": "NVFP4"})
    with pytest.raises(InvalidModel, match="ModelOpt's 'NVFP4'"):
        read(path, "m.weight")
