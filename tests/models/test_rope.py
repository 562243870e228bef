"""rope: frequencies that would follow the length are fixed to the served context."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxlm.models.build import build_model
from fxlm.models.rope import fix_lengths, follows_length
from fxlm.models.tiny import tiny_config

LONG: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8, "factor": 4.0, "original_max_position_embeddings": 128,
}  # fmt: skip
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
PLAIN: dict[str, Any] = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


def frequencies(model_type: str, rope: dict[str, Any], max_model_len: int) -> torch.Tensor:
    more = {"original_max_position_embeddings": 128} if model_type == "phi3" else {}
    model = build_model(tiny_config(model_type, rope_parameters=rope, **more), torch.float32)
    fix_lengths(model, max_model_len)
    found: torch.Tensor = model.model.rotary_emb.inv_freq
    return found


@pytest.mark.parametrize(("max_model_len", "factor"), [(128, 1.0), (129, 4.0)])
def test_longrope_takes_the_factors_of_the_context(max_model_len: int, factor: float) -> None:
    plain = 1e4 ** (-torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(frequencies("phi3", LONG, max_model_len), plain / factor)


def test_dynamic_scaling_starts_beyond_the_original_context() -> None:
    within, beyond = (frequencies("llama", DYNAMIC, n) for n in (512, 2048))
    torch.testing.assert_close(within, 1e4 ** (-torch.arange(0, 16, 2) / 16))
    assert beyond[-1] < within[-1]


def test_other_scalings_are_left_alone() -> None:
    model = build_model(tiny_config("llama", rope_parameters=PLAIN), torch.float32)
    assert fix_lengths(model, 64) == 0
    assert model.model.rotary_emb.rope_type == "linear"


def test_a_config_says_whether_its_length_matters() -> None:
    assert follows_length({"rope_scaling": {"type": "su"}})
    assert follows_length({"text_config": {"rope_parameters": LONG}})
    assert not follows_length({"rope_parameters": PLAIN})
