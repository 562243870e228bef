"""On a GPU: the same tokens as transformers, interpreted and compiled.

Skipped where torch sees no CUDA device, so on CI; `bench/gpu_session.sh` runs it where one is.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxlm.models.tiny import write_checkpoint
from fxlm.runtime.check import check_tokens
from fxlm.runtime.options import EngineOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


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
