"""The memory plan: figures that can be worked out by hand, and refusals that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fxlm.compiler.artifact import Artifact
from fxlm.compiler.errors import InvalidOption, OutOfMemory
from fxlm.runtime import machine
from fxlm.runtime.memory import OVERHEAD_BYTES, MemoryPlan, plan_memory
from fxlm.runtime.options import EngineOptions

MIB = 1 << 20
WEIGHTS = 100 * MIB
KV_PER_TOKEN = 2 * 2 * 4 * 64 * 2  # layers, K and V, heads, head size, bytes


@pytest.fixture
def artifact() -> Artifact:
    cache = {"num_kv_heads": 4, "key_dim": 64, "value_dim": 64, "dtype": "bfloat16"}
    manifest: dict[str, Any] = {
        "model": {
            "device": "cpu", "block_size": 16, "vocab_size": 1000,
            "max_position_embeddings": 4096, "max_tokens": 1024,
        },
        "weights": {"w": {"dtype": "bfloat16", "shape": [50, MIB], "stride": [MIB, 1]}},
        "caches": [cache, cache],
        "activations": {"per_token": 1000, "per_row": 100},
    }  # fmt: skip
    return Artifact(path=Path(), manifest=manifest)


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_limit_bytes", lambda: (4096 * MIB, "control group"))
    monkeypatch.setattr(machine, "memory_available_bytes", lambda: 2000 * MIB)


def plan(artifact: Artifact, **options: Any) -> MemoryPlan:
    return plan_memory(artifact, EngineOptions(**options))


def test_the_parts(artifact: Artifact) -> None:
    found = plan(artifact, max_num_seqs=36)
    assert found.weights_bytes == WEIGHTS
    assert found.kv_bytes_per_token == KV_PER_TOKEN
    assert found.activation_bytes == 512 * 1000 + (36 + 64) * 100


def test_codes_take_a_byte_each_and_four_for_the_scale(artifact: Artifact) -> None:
    for cache in artifact.manifest["caches"]:
        cache["dtype"] = "int8"
    found = plan(artifact, max_num_seqs=36)
    assert found.kv_bytes_per_token == 2 * 2 * 4 * (64 + 4)
    assert "int8 and a scale a head" in "\n".join(found.lines())


def test_the_cache_takes_what_is_left(artifact: Artifact) -> None:
    found = plan(artifact, memory_fraction=0.5)
    left = 1000 * MIB - WEIGHTS - found.activation_bytes - OVERHEAD_BYTES
    assert found.spec.num_blocks == left // (KV_PER_TOKEN * 16)


def test_the_cache_takes_no_more_than_can_be_used(artifact: Artifact) -> None:
    found = plan(artifact, max_num_seqs=2, max_model_len=160)
    assert found.spec.num_blocks == 2 * 10 + 1


def test_bytes_may_be_given(artifact: Artifact) -> None:
    found = plan(artifact, kv_cache_memory_bytes=1000 * KV_PER_TOKEN, max_model_len=64)
    assert found.spec.num_blocks == 1000 // 16


def test_the_context_is_shortened_if_nobody_asked_for_one(artifact: Artifact) -> None:
    found = plan(artifact, kv_cache_memory_bytes=101 * 16 * KV_PER_TOKEN)
    assert found.spec.max_model_len == 1600
    assert any("the model was made for 4096" in why for _, _, why in found.reasons)


def test_a_context_that_does_not_fit_is_refused_with_numbers(artifact: Artifact) -> None:
    with pytest.raises(OutOfMemory, match=r"4096 tokens needs 8 MiB .* 3 MiB are planned"):
        plan(artifact, kv_cache_memory_bytes=3 * MIB, max_model_len=4096)


def test_weights_that_do_not_fit_are_refused(artifact: Artifact) -> None:
    with pytest.raises(OutOfMemory, match=r"only 20 MiB of control group memory may be used"):
        plan(artifact, memory_fraction=0.01)


def test_a_context_beyond_the_model_is_refused(artifact: Artifact) -> None:
    with pytest.raises(InvalidOption, match="made for 4096 tokens at most"):
        plan(artifact, max_model_len=4097)


def test_a_step_takes_no_more_tokens_than_the_graph(artifact: Artifact) -> None:
    with pytest.raises(InvalidOption, match="takes 1024 at most"):
        plan(artifact, max_num_batched_tokens=1025)
    artifact.manifest["model"]["max_tokens"] = 100
    assert plan(artifact).spec.max_num_batched_tokens == 100


def test_the_text_names_what_fits(artifact: Artifact) -> None:
    text = "\n".join(plan(artifact, max_num_seqs=4, max_model_len=2048).lines())
    assert "fits: 4 x 512, 4 x 2048" in text
    assert "2048 bytes" in text
