"""Quantized models, served: greedy tokens equal transformers' on the dequantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fxlm.compiler import ops
from fxlm.models.tiny import write_checkpoint
from fxlm.runtime.check import generate, prompts
from fxlm.runtime.compile import Compilation
from fxlm.runtime.options import EngineOptions
from fxlm.runtime.sampling_params import SamplingParams
from fxlm.runtime.worker import build_engine
from tests.models.formats.test_compressed_tensors import write

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LENGTHS = (1, 7, 19)


def ours(path: Path, **options: Any) -> tuple[list[list[int]], Compilation]:
    engine, _, compilation = build_engine(
        EngineOptions(
            model=str(path), dtype="float32", enforce_eager=True, max_num_seqs=4,
            kv_cache_memory_bytes=8 << 20, **options,
        )
    )  # fmt: skip
    return generate(engine, prompts(256, 256, LENGTHS), GREEDY), compilation


def theirs(path: Path, weights: dict[str, torch.Tensor]) -> list[list[int]]:
    """Transformers' greedy tokens with these weights put in."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(weights)
    model.eval()
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    outputs = [model.generate(torch.tensor([p]), **settings) for p in prompts(256, 256, LENGTHS)]
    return [o[0, -12:].tolist() for o in outputs]


def rounded(weight: torch.Tensor, scheme: str) -> torch.Tensor:
    """Quantize and dequantize, as the scheme says."""
    ops.load()
    fxlm = torch.ops.fxlm
    if scheme == "fp8-channel":
        parts = (*fxlm.quantize_fp8(weight, [1, 0]), None)
        block, bits = [1, 0], 8
    elif scheme == "int8wo":
        parts = (*fxlm.quantize_int(weight, 8, 0, True)[:2], None)
        block, bits = [1, 0], 8
    else:
        parts = fxlm.quantize_int(weight, 4, 32, False)
        block, bits = [1, 32], 4
    dense: torch.Tensor = fxlm.dequantize(*parts, None, bits, block, torch.float32, "none")
    return dense


@pytest.mark.parametrize("scheme", ["int8wo", "int4-g32", "fp8-channel"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_online(family: str, scheme: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = write_checkpoint(family, tmp_path / "model")
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    weights = {
        name: rounded(value, scheme) if "proj.weight" in name else value
        for name, value in dense.items()
    }
    found, compilation = ours(path, quantization=scheme)
    assert found == theirs(path, weights)
    passes = {line["name"]: line["rewrites"] for line in compilation.artifact.manifest["passes"]}
    # q, k, v and o; a dense model's gate, up and down too. Experts are no linears.
    assert passes["quantize"] == (8 if family == "mixtral" else 14)
    assert passes["fuse_qkv"] == 2
    assert passes["fuse_quantized_linear"] == (4 if family == "mixtral" else 8)


@pytest.mark.parametrize("scheme", ["int4 asymmetric", "fp8 in blocks"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_checkpoint(family: str, scheme: str, tmp_path: Path) -> None:
    weights = write(tmp_path, scheme, family)
    found, compilation = ours(tmp_path)
    assert found == theirs(tmp_path, weights)
    passes = {line["name"]: line["rewrites"] for line in compilation.artifact.manifest["passes"]}
    assert passes["fuse_quantized_linear"] == 8
