"""One prompt, many circumstances, the same greedy tokens in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fxlm.models.tiny import write_checkpoint
from fxlm.runtime.check import generate, prompts, run
from fxlm.runtime.engine import Engine
from fxlm.runtime.options import EngineOptions
from fxlm.runtime.request import Request
from fxlm.runtime.sampling_params import SamplingParams
from fxlm.runtime.worker import build_engine

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
LENGTHS = (40, 1, 17, 33, 5, 64, 16, 15, 48, 3, 31, 32, 9, 20, 2, 60)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    # Sliding windows in every other layer: the hardest of the usual attentions.
    return str(write_checkpoint("gemma2", tmp_path_factory.mktemp("equivalence")))


def engine(model: str, **options: Any) -> Engine:
    defaults: dict[str, Any] = {
        "dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 16 << 20, "max_num_seqs": 16, "max_num_batched_tokens": 512,
    }  # fmt: skip
    made, _, _ = build_engine(EngineOptions(model=model, **{**defaults, **options}))
    return made


@pytest.fixture(scope="module")
def alone(model: str) -> list[list[int]]:
    made = engine(model)
    return [generate(made, [p], GREEDY)[0] for p in given()]


def given() -> list[list[int]]:
    return prompts(256, 256, LENGTHS)


def differing(left: Sequence[list[int]], right: Sequence[list[int]]) -> list[int]:
    return [i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b]


def test_in_a_batch_of_sixteen(model: str, alone: list[list[int]]) -> None:
    assert not differing(generate(engine(model), given(), GREEDY), alone)


def test_under_chunked_prefill(model: str, alone: list[list[int]]) -> None:
    assert not differing(generate(engine(model, max_num_batched_tokens=16), given(), GREEDY), alone)


def test_through_the_prefix_cache(model: str, alone: list[list[int]]) -> None:
    made = engine(model, enable_prefix_caching=True)
    assert not differing(generate(made, given(), GREEDY), alone)
    again = run(made, [Request(request_id="again", prompt_token_ids=given()[0], params=GREEDY)])
    assert max(o.num_cached_tokens for o in again["again"]) == 32
    assert [t for o in again["again"] for t in o.token_ids] == alone[0]


def test_after_preemption(model: str, alone: list[list[int]]) -> None:
    # 2 layers x 2 x 2 heads x 16 x 4 bytes x 16 tokens a block; room for about five prompts.
    made = engine(model, kv_cache_memory_bytes=26 * 8192)
    outputs = generate(made, given(), GREEDY)
    assert made.stats().num_preemptions > 0
    assert not differing(outputs, alone)


def test_drawn_tokens_do_not_depend_on_the_batch(model: str) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_tokens=12, ignore_eos=True)
    single = [generate(engine(model), [p], params)[0] for p in given()[:4]]
    assert not differing(generate(engine(model), given()[:4], params), single)


def test_compiled(tmp_path: Path) -> None:
    path = str(write_checkpoint("llama", tmp_path / "model"))
    single = engine(path, enforce_eager=False)
    expected = [generate(single, [p], GREEDY)[0] for p in given()]
    chunked = engine(path, enforce_eager=False, max_num_batched_tokens=16)
    assert not differing(generate(chunked, given(), GREEDY), expected)


@pytest.mark.parametrize("cached", ["int8", "fp8"])
def test_a_cache_of_codes_changes_with_nothing(model: str, cached: str) -> None:
    """Batched, chunked, through the prefix cache, after preemption: as each prompt alone."""
    single = engine(model, kv_cache_dtype=cached)
    expected = [generate(single, [p], GREEDY)[0] for p in given()]
    # 2 layers x 2 x 2 heads x (16 codes + a scale of 4 bytes) x 16 tokens a block
    squeezed = engine(model, kv_cache_dtype=cached, kv_cache_memory_bytes=26 * 2560)
    for made in (
        engine(model, kv_cache_dtype=cached, max_num_batched_tokens=16),
        engine(model, kv_cache_dtype=cached, enable_prefix_caching=True),
        squeezed,
    ):
        assert not differing(generate(made, given(), GREEDY), expected)
    assert squeezed.stats().num_preemptions > 0


@pytest.mark.parametrize("cached", ["int8", "fp8"])
def test_forks_copy_codes_and_scales(model: str, cached: str) -> None:
    """Forks share the prompt's blocks, copy the last, and go on as one alone does."""
    made = engine(model, kv_cache_dtype=cached, enable_prefix_caching=True)
    prompt = given()[0]  # 40 tokens: its last block is half full
    expected = generate(made, [prompt], GREEDY)[0]
    likeliest = SamplingParams(temperature=1.0, top_k=1, n=3, max_tokens=20, ignore_eos=True)
    request = Request(request_id="forks", prompt_token_ids=prompt, params=likeliest)
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for output in run(made, [request])["forks"]:
        tokens[output.index] += output.token_ids
    assert list(tokens.values()) == [expected] * 3
