"""Scales of the KV cache: found by name, for the codes that they are for, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fxlm.compiler.errors import InvalidModel
from fxlm.models.checkpoint import Checkpoint, open_checkpoint
from fxlm.models.kv_scales import kv_scales
from tests.models.formats.reading import write

FP8 = torch.float8_e4m3fn
PREFIX = "model.layers.3.self_attn"
ONE = torch.ones(1)


def opened(path: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Checkpoint:
    named = {f"{PREFIX}.{name}": value.clone() for name, value in tensors.items()}
    return open_checkpoint(write(path, named, **{"quant_method": "fp8", **settings}))


@pytest.mark.parametrize(
    "names",
    [
        ("k_scale", "v_scale"),
        ("attn.k_scale", "attn.v_scale"),
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
    ],
)
@pytest.mark.parametrize("shape", [(), (1,), (2,)])
def test_scales_are_found_by_layer(
    names: tuple[str, str], shape: tuple[int, ...], tmp_path: Path
) -> None:
    checkpoint = opened(tmp_path, {name: torch.ones(shape) for name in names})
    expected = {3: tuple(f"{PREFIX}.{name}" for name in names)}
    assert kv_scales(checkpoint, FP8, 2) == expected


SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
CASES: dict[str, tuple[dict[str, Any], torch.dtype | None, bool]] = {
    "fp8": ({}, FP8, True),
    "the activations' type": ({}, None, False),
    "other codes": ({}, torch.int8, False),
    "int8 by the scheme": ({"kv_cache_scheme": {**SCHEME, "type": "int"}}, torch.int8, True),
    "fp8 by the scheme": ({"kv_cache_scheme": SCHEME}, FP8, True),
    "int8 by the scheme, fp8 asked for": (
        {"kv_cache_scheme": {**SCHEME, "type": "int"}}, FP8, False,
    ),
    "dynamic": ({"kv_cache_scheme": {**SCHEME, "dynamic": True}}, FP8, False),
    "asymmetric": ({"kv_cache_scheme": {**SCHEME, "symmetric": False}}, FP8, False),
    "four bits": ({"kv_cache_scheme": {**SCHEME, "num_bits": 4}}, FP8, False),
    "ModelOpt": ({"quantization": {"kv_cache_quant_algo": "NVFP4"}}, FP8, False),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_scales_are_used_for_their_own_codes(case: str, tmp_path: Path) -> None:
    settings, dtype, used = CASES[case]
    checkpoint = opened(tmp_path, {"k_scale": ONE, "v_scale": ONE}, **settings)
    assert bool(kv_scales(checkpoint, dtype, 2)) == used


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"k_scale": ONE}, "layer 3 has '.*k_scale', but not that of the other"),
        ({"k_scale": ONE, "v_scale": torch.zeros(1)}, r"v_scale' .* holds \[0.0\]"),
        ({"k_scale": ONE * torch.nan, "v_scale": ONE}, r"k_scale' .* holds \[nan\]"),
        ({"k_scale": torch.ones(3), "v_scale": ONE}, r"k_scale' .*\[3\], must be one value or"),
        ({"k_scale": ONE.int(), "v_scale": ONE}, "k_scale' .* is I32, must be"),
    ],
)
def test_what_is_no_scale_is_refused(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidModel, match=message):
        kv_scales(opened(tmp_path, tensors), FP8, 2)
