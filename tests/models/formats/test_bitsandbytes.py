"""bitsandbytes checkpoints: equal to what the library's CPU code unpacks, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fxlm.compiler.errors import InvalidModel
from tests.models.formats.reading import read, write

functional = pytest.importorskip("bitsandbytes.functional")
SETTINGS: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def packed(
    shape: tuple[int, int], kind: str, nested: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors as a checkpoint has them, and what the library makes of them.

    It works on rows of a block each, which are the same codes: its CPU code is wrong where blocks
    run over the ends of rows (0.50.2).
    """
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(
        weight.view(-1, 64), blocksize=64, quant_type=kind, compress_statistics=nested
    )
    dense = functional.dequantize_4bit(codes, state).view(shape)
    state.shape = torch.Size(shape)
    beside = {f"m.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {"m.weight": codes, **beside}, dense


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(48, 128), (64, 96)])
def test_four_bits(shape: tuple[int, int], kind: str, nested: bool, tmp_path: Path) -> None:
    tensors, expected = packed(shape, kind, nested)
    found = read(write(tmp_path, tensors, **SETTINGS), "m.weight")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_eight_bits(tmp_path: Path) -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
    tensors = {"m.weight": codes, "m.SCB": scale.float()}
    found = read(write(tmp_path, tensors, quant_method="bitsandbytes"), "m.weight")
    expected = functional.int8_vectorwise_dequant(codes, scale)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)


def test_a_truncated_weight_is_refused(tmp_path: Path) -> None:
    tensors, _ = packed((48, 128), "nf4", False)
    tensors["m.weight"] = tensors["m.weight"][:100].contiguous()
    with pytest.raises(InvalidModel, match=r"shape \[100, 1\], must be \[3072, 1\]"):
        read(write(tmp_path, tensors, **SETTINGS), "m.weight")


def test_a_state_that_is_no_json_is_refused(tmp_path: Path) -> None:
    tensors, _ = packed((48, 128), "nf4", False)
    name = next(n for n in tensors if "quant_state" in n)
    tensors[name] = torch.zeros(5, dtype=torch.uint8)
    with pytest.raises(InvalidModel, match="is no quantization state"):
        read(write(tmp_path, tensors, **SETTINGS), "m.weight")


@pytest.mark.parametrize(
    "changed", [{"blocksize": 0}, {"blocksize": -64}, {"nested_offset": float("nan")}]
)
def test_a_state_of_impossible_numbers_is_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    tensors, _ = packed((48, 128), "nf4", True)
    name = next(n for n in tensors if "quant_state" in n)
    state = json.loads(bytes(tensors[name].tolist())) | changed
    tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(InvalidModel, match="is no quantization state"):
        read(write(tmp_path, tensors, **SETTINGS), "m.weight")


def test_an_unknown_code_is_refused(tmp_path: Path) -> None:
    tensors, _ = packed((48, 128), "nf4", False)
    name = next(n for n in tensors if "quant_state" in n)
    tensors[name.replace("nf4", "af3")] = tensors.pop(name)
    with pytest.raises(InvalidModel, match=r"m\.weight is 'af3'; read are nf4, fp4"):
        read(write(tmp_path, tensors, **SETTINGS), "m.weight")
