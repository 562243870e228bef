"""What a checkpoint and its options make of the column."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fxlm.compiler import pipeline
from fxlm.compiler.errors import InvalidOption
from fxlm.compiler.options import CompileOptions
from fxlm.models.checkpoint import open_checkpoint
from fxlm.runtime.compile import compile_model
from fxlm.runtime.front import front
from tests.checkpoints import make_checkpoint


def with_kv_scales(path: Path, shape: tuple[int, ...]) -> Path:
    """A tiny Llama whose second layer has scales of the KV cache."""
    make_checkpoint("llama", path)
    tensors = load_file(path / "model.safetensors")
    for name in "kv":
        tensors[f"model.layers.1.self_attn.{name}_scale"] = torch.full(shape, 0.25)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
def test_kv_scales_of_the_checkpoint_are_used_for_their_codes(
    kv_cache_dtype: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(with_kv_scales(tmp_path, ()))
    start = front(checkpoint, CompileOptions(kv_cache_dtype=kv_cache_dtype))
    program = pipeline.run(start.program, start.column)
    first, second = program.attentions()
    assert first.args[-2:] == (None, None)
    given = [node is not None for node in second.args[-2:]]
    assert given == [kv_cache_dtype == "fp8"] * 2


def test_every_rank_has_the_scales(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(with_kv_scales(tmp_path / "m", ()))
    for rank in (0, 1):
        options = CompileOptions(kv_cache_dtype="fp8", eager=True, ranks=2, rank=rank)
        made = compile_model(checkpoint, options, cache_dir=tmp_path / "cache")
        assert "layers.1.self_attn.k_scale" in (made.artifact.path / "load.json").read_text()


def test_a_scale_a_head_is_refused_where_ranks_divide_heads(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(with_kv_scales(tmp_path, (2,)))
    with pytest.raises(InvalidOption, match=r"layers\.1.*k_scale.* has a scale a head"):
        front(checkpoint, CompileOptions(kv_cache_dtype="fp8", ranks=2))
