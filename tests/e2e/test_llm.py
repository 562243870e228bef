"""LLM: the offline API, over the small bundled model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from fxlm import LLM, SamplingParams
from fxlm.compiler.errors import InvalidOption, InvalidRequest, OutOfMemory


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("bundled-draft", dtype="float32", enforce_eager=True, max_num_seqs=8)


GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def test_text_ids_and_dicts_are_the_same_prompt(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("import os")
    prompts = ["import os", ids, {"prompt": "import os"}, {"prompt_token_ids": ids}]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert len({o.outputs[0].text for o in outputs}) == 1
    assert [o.prompt for o in outputs] == ["import os", None, "import os", None]


def test_a_list_of_ids_is_one_prompt(llm: LLM) -> None:
    assert len(llm.generate([5, 6, 7], GREEDY)) == 1


def test_n_completions_differ(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, n=3, seed=1, max_tokens=12)
    (output,) = llm.generate("def", params)
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert len({tuple(c.token_ids) for c in output.outputs}) == 3


def test_logprobs_of_greedy_tokens_are_the_highest(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=3, prompt_logprobs=1)
    (output,) = llm.generate("import os", params)
    completion = output.outputs[0]
    assert completion.logprobs is not None
    for token, found in zip(completion.token_ids, completion.logprobs, strict=True):
        assert found[token].rank == 1
        assert found[token].logprob == max(entry.logprob for entry in found.values())
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)


def test_penalties_and_bias_change_the_choice(llm: LLM) -> None:
    plain = llm.generate("import os", GREEDY)[0].outputs[0].token_ids
    first = plain[0]
    biased = SamplingParams(temperature=0.0, max_tokens=8, logit_bias={first: -100.0})
    assert first not in llm.generate("import os", biased)[0].outputs[0].token_ids
    once = SamplingParams(temperature=0.0, max_tokens=24, frequency_penalty=2.0)
    tokens = llm.generate("import os", once)[0].outputs[0].token_ids
    repeated = llm.generate("import os", SamplingParams(temperature=0.0, max_tokens=24))
    assert len(set(tokens)) > len(set(repeated[0].outputs[0].token_ids))


def test_stop_string_ends_and_is_cut(llm: LLM) -> None:
    whole = llm.generate("import os", SamplingParams(temperature=0.0, max_tokens=16))
    text = whole[0].outputs[0].text
    stop = text[4:7]
    cut = SamplingParams(temperature=0.0, max_tokens=16, stop=stop)
    completion = llm.generate("import os", cut)[0].outputs[0]
    assert completion.text == text[: text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


def test_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello!"}]
    (output,) = llm.chat(messages, GREEDY)
    assert output.prompt is not None
    assert output.prompt.endswith("<|assistant|>")
    assert output.outputs[0].token_ids


def test_defaults_come_from_the_checkpoint(llm: LLM) -> None:
    params = llm.get_default_sampling_params()
    assert params.max_tokens == 16
    assert llm.generate("import os")[0].outputs[0].token_ids


def test_nothing_runs_if_one_prompt_is_wrong(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        llm.generate(["fine", {"prompt_token_ids": []}], GREEDY)
    assert not llm.engine.has_unfinished()


def test_too_long_a_prompt_names_both_counts(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"3000 tokens .* 2048"):
        llm.generate({"prompt_token_ids": [5] * 3000}, GREEDY)


def test_the_number_of_params_must_fit(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="2 sampling_params for 1 prompts"):
        llm.generate("a", [GREEDY, GREEDY])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_length": 8}, "did you mean 'max_model_len'"),
        ({"dtype": "float8"}, "use auto, float32"),
        ({"max_model_len": "8"}, "max_model_len"),
        ({"block_size": 12}, "power of two"),
        ({"kv_cache_dtype": "fp4"}, "use auto, int8, fp8, fp8_e4m3"),
        ({"device": "tpu"}, "use auto, cpu or cuda"),
        ({"max_model_len": 4096}, "made for 2048 tokens"),
        ({"passes": ["nowhere.py:f"]}, "a file that exists"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        LLM("bundled-draft", enforce_eager=True, **options)


def test_a_cache_too_small_for_one_sequence_is_refused() -> None:
    with pytest.raises(OutOfMemory, match="raise --kv-cache-memory-bytes"):
        LLM("bundled-draft", enforce_eager=True, kv_cache_memory_bytes=1 << 16, max_model_len=2048)


def test_a_generator_loses_nothing(llm: LLM) -> None:
    outputs = llm.generate((text for text in ["import os", "def"]), GREEDY, use_tqdm=False)
    assert [o.prompt for o in outputs] == ["import os", "def"]


def test_penalties_over_a_long_prompt(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, repetition_penalty=1.2)
    assert llm.generate({"prompt_token_ids": list(range(20, 90))}, params)[0].outputs[0].token_ids


def test_threads_take_turns(llm: LLM) -> None:
    expected = llm.generate("import os", GREEDY)[0].outputs[0].token_ids
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(llm.generate, "import os", GREEDY) for _ in range(3)]
    assert [run.result()[0].outputs[0].token_ids for run in runs] == [expected] * 3


@pytest.mark.parametrize("prompt", [None, 5, [None], [1.5], [["a", "b"]], b"abc", [[True]],
                                    {"prompt_token_ids": "abc"}])  # fmt: skip
def test_odd_prompts_are_refused(llm: LLM, prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="prompt"):
        llm.generate(prompt, GREEDY)


def test_arrays_are_token_ids(llm: LLM) -> None:
    expected = llm.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids
    assert llm.generate(np.array([5, 6, 7]), GREEDY)[0].outputs[0].token_ids == expected


def test_a_start_says_whether_the_artifact_was_verified(capfd: pytest.CaptureFixture[str]) -> None:
    LLM("bundled-draft", dtype="float32", enforce_eager=True, max_num_seqs=8)
    assert "fxlm: not verified: `fxlm verify`" in capfd.readouterr().err
