"""GPTQ checkpoints: equal to what the format's own library unpacks, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxlm.compiler.errors import InvalidModel
from tests.models.formats.reading import golden, read, write

CASES = ("v2_4", "v1_4", "v1_4_desc_act", "v2_8", "v1_8", "v1_2")


def settings(case: str) -> dict[str, object]:
    version = "gptq_v2" if case.startswith("v2") else "gptq"
    bits = int(case.split("_")[1])
    return {
        "quant_method": "gptq", "bits": bits, "checkpoint_format": version,
        "desc_act": "desc_act" in case,
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_the_library(case: str, tmp_path: Path) -> None:
    tensors, expected = golden("gptq.safetensors", case)
    found = read(write(tmp_path, tensors, **settings(case)), "m.weight")
    # The library multiplies in float16.
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4)


def test_a_layer_without_an_index_is_in_order(tmp_path: Path) -> None:
    tensors, expected = golden("gptq.safetensors", "v1_4")
    del tensors["m.g_idx"]
    found = read(write(tmp_path, tensors, **settings("v1_4")), "m.weight")
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4)


def test_desc_act_without_an_index_is_refused(tmp_path: Path) -> None:
    tensors, _ = golden("gptq.safetensors", "v1_4_desc_act")
    del tensors["m.g_idx"]
    with pytest.raises(InvalidModel, match=r"lacks tensor 'm.g_idx' \(desc_act\)"):
        read(write(tmp_path, tensors, **settings("v1_4_desc_act")), "m.weight")


def test_an_index_of_another_shape_is_refused(tmp_path: Path) -> None:
    tensors, _ = golden("gptq.safetensors", "v1_4")
    tensors["m.g_idx"] = tensors["m.g_idx"].unsqueeze(1)
    with pytest.raises(InvalidModel, match=r"m.g_idx has shape \[128, 1\], must be a vector"):
        read(write(tmp_path, tensors, **settings("v1_4")), "m.weight")


def test_zero_points_of_another_width_are_refused(tmp_path: Path) -> None:
    tensors, _ = golden("gptq.safetensors", "v2_8")
    tensors["m.qzeros"] = tensors["m.qzeros"][:, :8].contiguous()
    with pytest.raises(InvalidModel, match=r"'m.qzeros'.* has shape \[1, 8\], must be \[1, 16\]"):
        read(write(tmp_path, tensors, **settings("v2_8")), "m.weight")


def test_three_bits_are_refused(tmp_path: Path) -> None:
    tensors, _ = golden("gptq.safetensors", "v1_4")
    tensors["m.qweight"] = tensors["m.qweight"][:12].contiguous()
    with pytest.raises(InvalidModel, match="3-bit codes"):
        read(write(tmp_path, tensors, **settings("v1_4")), "m.weight")


def test_an_unknown_version_is_refused(tmp_path: Path) -> None:
    tensors, _ = golden("gptq.safetensors", "v1_4")
    changed = {**settings("v1_4"), "checkpoint_format": "marlin"}
    with pytest.raises(InvalidModel, match="checkpoint_format 'marlin'"):
        read(write(tmp_path, tensors, **changed), "m.weight")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 8}, "m has 4-bit codes, but its quantization says bits=8"),
        ({"group_size": 16}, "m.scales has .* groups of .* group_size=16"),
        ({"group_size": 0}, "group_size=0"),
    ],
)
def test_settings_that_contradict_the_tensors_are_refused(
    changed: dict[str, int], message: str, tmp_path: Path
) -> None:
    tensors, _ = golden("gptq.safetensors", "v1_4")
    path = write(tmp_path, tensors, **{**settings("v1_4"), **changed})
    with pytest.raises(InvalidModel, match=message):
        read(path, "m.weight")


@pytest.mark.parametrize(
    ("value", "message"), [(1000, "has groups 0 to 1000, but there are"), (1, "puts .* inputs")]
)
def test_groups_that_do_not_exist_or_differ_in_size_are_refused(
    value: int, message: str, tmp_path: Path
) -> None:
    tensors, _ = golden("gptq.safetensors", "v1_4_desc_act")
    groups = tensors["m.g_idx"].clone()
    groups[(groups == 0).nonzero()[0]] = value
    with pytest.raises(InvalidModel, match=rf"'m.g_idx' .*{message}"):
        read(
            write(tmp_path, tensors | {"m.g_idx": groups}, **settings("v1_4_desc_act")), "m.weight"
        )
