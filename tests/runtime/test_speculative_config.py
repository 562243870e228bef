"""--speculative-config: vLLM's keys, and errors that name theirs."""

import math
from typing import Any

import pytest

from fxlm.compiler.errors import InvalidOption
from fxlm.runtime.options import EngineOptions, compile_options, from_mapping
from fxlm.runtime.speculative_config import SpeculativeConfig, speculative_config


def test_text_mapping_and_object_are_the_same() -> None:
    wanted = SpeculativeConfig(method="ngram", num_speculative_tokens=3, prompt_lookup_max=4)
    text = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}'
    for given in (wanted, text, {"method": "ngram", "num_speculative_tokens": 3,
                                 "prompt_lookup_max": 4}):  # fmt: skip
        assert speculative_config(given) == wanted
        options = from_mapping({"speculative_config": given})
        assert options.speculative_config == wanted
        assert from_mapping(options.as_json()) == options


def test_what_is_left_out_is_resolved() -> None:
    assert speculative_config({"model": "x"}).kind == "draft_model"
    assert speculative_config({"method": "suffix"}).most == 16
    assert speculative_config({"method": "ngram"}).most == 4
    lookups = [{}, {"prompt_lookup_max": 1}, {"prompt_lookup_min": 9}, {"prompt_lookup_max": 8}]
    found = [speculative_config({"method": "ngram", **lookup}).lookup for lookup in lookups]
    assert found == [(2, 5), (1, 1), (9, 9), (2, 8)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methd": "ngram"}, r"speculative_config\.methd='ngram'.* did you mean 'method'"),
        ({"method": "ngrams"}, r"method='ngrams'.*did you mean 'ngram'"),
        ({"method": "magic"}, r"method='magic'.*use ngram, suffix, draft_model, custom_class"),
        ({"method": "ngram", "prompt_lookup_max": 0}, r"prompt_lookup_max=0.*at least 1"),
        ({}, "give ngram, suffix, draft_model or custom_class"),
        ({"method": "draft_model"}, "method draft_model needs one"),
        ({"method": "custom_class"}, "method custom_class needs one"),
        ({"method": "ngram", "model": "x"}, "method ngram takes none"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "use 1 to 64"),
        ({"method": "ngram", "num_speculative_tokens": "4"}, "Expected `int"),
        ({"method": "ngram", "prompt_lookup_min": 7, "prompt_lookup_max": 3}, "use 1 to 3"),
        ({"method": "suffix", "suffix_decoding_min_token_prob": 1.5}, "at most 1"),
        ({"method": "suffix", "suffix_decoding_max_tree_depth": 1}, "at least 2"),
        ({"method": "suffix", "suffix_decoding_max_spec_factor": math.inf}, "finite"),
        ({"method": "suffix", "suffix_decoding_max_spec_factor": math.nan}, "finite"),
        ({"model": "x", "max_model_len": 1}, "at least 2"),
        ("{method: ngram}", "it is no JSON"),
        ("[1]", "give an object"),
    ],
)
def test_wrong_keys_and_values(given: Any, message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        from_mapping({"speculative_config": given})


def test_the_graph_verifies_only_where_something_is_drafted() -> None:
    config = SpeculativeConfig(method="ngram")
    assert not compile_options(EngineOptions()).verify
    assert compile_options(EngineOptions(speculative_config=config)).verify
