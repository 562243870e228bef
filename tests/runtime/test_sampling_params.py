"""Bounds of the sampling options: each wrong field is named, each edge is accepted."""

import math
from typing import Any

import msgspec
import pytest

from fxlm.compiler.errors import InvalidRequest
from fxlm.runtime.sampling_params import SamplingParams

WRONG: list[tuple[str, dict[str, Any]]] = [
    ("n", {"n": 0}),
    ("n", {"n": 16385}),
    ("n", {"n": 2, "temperature": 0.0}),
    ("presence_penalty", {"presence_penalty": 2.1}),
    ("frequency_penalty", {"frequency_penalty": -2.1}),
    ("repetition_penalty", {"repetition_penalty": 0.0}),
    ("repetition_penalty", {"repetition_penalty": math.inf}),
    ("temperature", {"temperature": -0.1}),
    ("temperature", {"temperature": 2.1}),
    ("temperature", {"temperature": math.nan}),
    ("temperature", {"temperature": "hot"}),
    ("top_p", {"top_p": 0.0}),
    ("top_p", {"top_p": 1.1}),
    ("top_p", {"top_p": math.nan}),
    ("top_k", {"top_k": -2}),
    ("top_k", {"top_k": 1.5}),
    ("top_k", {"top_k": 2**31}),
    ("min_p", {"min_p": 1.1}),
    ("seed", {"seed": 2**63}),
    ("stop", {"stop": [""]}),
    ("stop", {"stop": ["a", 5]}),
    ("stop", {"stop": "a", "detokenize": False}),
    ("stop_token_ids", {"stop_token_ids": [100]}),
    ("stop_token_ids", {"stop_token_ids": [-1]}),
    ("max_tokens", {"max_tokens": 0}),
    ("min_tokens", {"min_tokens": -1}),
    ("min_tokens", {"min_tokens": 6, "max_tokens": 5}),
    ("min_tokens", {"min_tokens": 65, "max_tokens": None}),
    ("logprobs", {"logprobs": 21}),
    ("logprobs", {"logprobs": -1}),
    ("prompt_logprobs", {"prompt_logprobs": 21}),
    ("tap_prompt", {"tap_prompt": True}),
    ("tap_prompt", {"tap_prompt": True, "taps": []}),
    ("logit_bias", {"logit_bias": {100: 1.0}}),
    ("logit_bias", {"logit_bias": {1: math.nan}}),
    ("allowed_token_ids", {"allowed_token_ids": [1]}),
    ("bad_words", {"bad_words": ["x"]}),
]

RIGHT: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 2.0, "top_p": 1.0, "top_k": -1, "min_p": 1.0},
    {"n": 3, "temperature": 1},
    {"seed": -(2**63)},
    {"min_tokens": 5, "max_tokens": 5},
    {"logprobs": 0, "prompt_logprobs": 20},
    {"stop": "a", "stop_token_ids": [0, 99]},
    {"logit_bias": {0: 1000.0}},
    {"bad_words": []},
]


@pytest.mark.parametrize(("field", "options"), WRONG)
def test_a_wrong_field_is_named(field: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**options).verify(100, 64)
    assert caught.value.param == field
    assert field in str(caught.value)


@pytest.mark.parametrize("options", RIGHT)
def test_edges_are_accepted_and_cross_the_wire(options: dict[str, Any]) -> None:
    params = SamplingParams(**options)
    params.verify(100, 64)
    frame = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(frame, type=SamplingParams) == params


def test_equal_meanings_have_one_form() -> None:
    assert SamplingParams(stop="a").stop_strings == ["a"]
    assert SamplingParams().stop_strings == []
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(temperature=0.001).temperature == 0.01
    assert SamplingParams(temperature=0.0).is_greedy


def test_an_unknown_name_is_an_error_and_so_is_a_change() -> None:
    with pytest.raises(TypeError, match="tempersture"):
        SamplingParams(tempersture=1.0)  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        SamplingParams().n = 2  # type: ignore[misc]
