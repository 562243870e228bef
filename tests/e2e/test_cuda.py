"""On a GPU: the same tokens as transformers, interpreted and compiled, and the same as on a CPU.

What needs a GPU is skipped where torch sees none, so on CI; `bench/gpu_session.sh` runs it where
one is. What a CPU can run as well runs on it too, so that the tests themselves stay right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fxlm import LLM, SamplingParams
from fxlm.models.tiny import write_checkpoint
from fxlm.runtime.check import check_tokens
from fxlm.runtime.options import EngineOptions

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
PROMPTS = [[3, 17, 99, 4] * 6, [5, 200, 8]]


@needs_cuda
@pytest.mark.parametrize("eager", [True, False], ids=["interpreted", "compiled"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral"])
def test_tokens_equal(model_type: str, eager: bool, tmp_path: Path) -> None:
    path = write_checkpoint(model_type, tmp_path / "model")
    result = check_tokens(
        EngineOptions(
            model=str(path), device="cuda", enforce_eager=eager, max_num_seqs=8,
            max_num_batched_tokens=24, kv_cache_memory_bytes=32 << 20,
        )
    )  # fmt: skip
    assert result.ours == result.theirs, f"margin {result.margin}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("cuda") / "model")


def run(path: Path, device: str, options: dict[str, Any]) -> list[list[int]]:
    llm = LLM(
        str(path), device=device, dtype="float32", enforce_eager=True, max_num_seqs=4,
        kv_cache_memory_bytes=8 << 20, skip_tokenizer_init=True, **options,
    )  # fmt: skip
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)
    given = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    made = llm.generate(given, greedy, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in made]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        *({"quantization": scheme} for scheme in ("int8", "int8wo", "int4", "fp8-channel")),
        *({"kv_cache_dtype": dtype} for dtype in ("int8", "fp8")),
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_rounded_models_and_caches_give_the_tokens_of_a_cpu(
    options: dict[str, str], device: str, checkpoint: Path
) -> None:
    assert run(checkpoint, device, options) == run(checkpoint, "cpu", options)
