"""Points: what a request may ask of them."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from fxlm.compiler.errors import InvalidRequest
from fxlm.runtime import points
from fxlm.runtime.points import Points
from fxlm.runtime.request import Request
from fxlm.runtime.sampling_params import SamplingParams
from fxlm.runtime.step import WorkerSpec

SPEC = SimpleNamespace(taps={"one": (64,), "two": (64,)}, steered={}, max_num_seqs=4,
                       max_model_len=100)  # fmt: skip


def admit(taps: list[str], **values: Any) -> Request:
    params = SamplingParams(taps=taps, max_tokens=6)
    request = Request(request_id="a", prompt_token_ids=[1], params=params, **values)
    return Points(cast(WorkerSpec, SPEC)).admit(request)


def test_a_point_named_twice_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="taps name 'one' twice: name each point once"):
        admit(["one", "two", "one"])


def test_prompts_asked_for_together_share_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "MAX_TAP_BYTES", 2 * 6 * 4 * 64)
    assert admit(["one"], num_together=2)
    with pytest.raises(InvalidRequest, match="6 tokens of each of 3 prompts take 4608 bytes"):
        admit(["one"], num_together=3)
