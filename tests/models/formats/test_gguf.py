"""Blocks of GGUF tensors: every type as gguf-py's numpy code dequantizes it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from fxlm.compiler import ops
from fxlm.compiler.errors import InvalidModel
from fxlm.models.formats.gguf import DECODERS
from fxlm.models.gguf_file import TYPES
from tests.models.formats.reading import read, write

# Bytes of a block at which a float16 stands: random ones would be infinite.
HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "Q4_0": (0,),
    "Q5_0": (0,),
    "Q8_0": (0,),
}


@pytest.mark.parametrize("name", DECODERS)
def test_equals_the_library(name: str) -> None:
    number, width = next((n, w) for n, (label, _, w) in TYPES.items() if label == name)
    draw = np.random.default_rng(0)
    raw = draw.integers(0, 256, (6, 3, width), dtype=np.uint8)
    for place in HALVES.get(name, (0, 2)):
        halves = draw.normal(size=(6, 3, 1)).astype(np.float16)
        raw[..., place : place + 2] = halves.view(np.uint8)
    flat = raw.reshape(6, -1)
    ops.load()
    codes, scale, offset, bits = DECODERS[name](torch.from_numpy(flat))
    group = codes.shape[1] // scale.shape[1]
    found = torch.ops.fxlm.dequantize(
        codes, scale, offset, None, bits, [1, group], torch.float32, "none"
    )
    expected = gguf.quants.dequantize(flat, gguf.GGMLQuantizationType(number))
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-6, atol=1e-5)
    assert bits == 8 or (codes.min() >= -8 and codes.max() <= 7)


def test_tensors_of_another_file_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"m.weight": torch.ones(2, 2)}, quant_method="gguf")
    with pytest.raises(InvalidModel, match=r"is gguf, but 'm.weight' is in no GGUF file"):
        read(path, "m.weight")
