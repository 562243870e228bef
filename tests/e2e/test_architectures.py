"""Greedy tokens of many families equal transformers' own in float32, with no code per model.

Interpreted for every family, compiled for a few that differ in kind: the graph is the same,
and `bench/model_coverage.py` runs all of them compiled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fxlm.models.tiny import write_checkpoint
from fxlm.runtime.check import check_logprobs, check_tokens
from fxlm.runtime.options import EngineOptions

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (name, {})
        for name in (
            "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2",
            "gpt_neox", "opt", "falcon", "granite", "olmo2", "stablelm", "cohere", "mixtral",
            "qwen3_moe",
        )
    },
    "llama3 scaling": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
}  # fmt: skip
COMPILED = ("llama", "gemma2", "gpt2", "mixtral")


def options(path: Path, **more: Any) -> EngineOptions:
    """Small enough that prompts are cut into chunks and blocks are shared by many steps."""
    return EngineOptions(
        model=str(path), max_num_seqs=8, max_num_batched_tokens=24,
        kv_cache_memory_bytes=32 << 20, **more,
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_interpreted(family: str, tmp_path: Path) -> None:
    model_type, overrides = FAMILIES[family]
    path = write_checkpoint(model_type, tmp_path / "model", **overrides)
    result = check_tokens(options(path, enforce_eager=True))
    assert result.ours == result.theirs, f"margin {result.margin}"
    assert len({tuple(t) for t in result.ours}) > 1, "all prompts gave the same tokens"


@pytest.mark.parametrize("family", COMPILED)
def test_tokens_equal_compiled(family: str, tmp_path: Path) -> None:
    model_type, overrides = FAMILIES[family]
    path = write_checkpoint(model_type, tmp_path / "model", **overrides)
    result = check_tokens(options(path))
    assert result.ours == result.theirs, f"margin {result.margin}"


def test_bfloat16_is_as_close_to_float32_as_transformers(tmp_path: Path) -> None:
    path = write_checkpoint("llama", tmp_path / "model")
    result = check_logprobs(options(path, enforce_eager=True))
    assert result.within, result
