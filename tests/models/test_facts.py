"""Facts from configs of every spelling."""

import pytest

from fxlm.compiler.errors import InvalidModel
from fxlm.models.facts import ModelFacts, facts
from fxlm.models.tiny import tiny_config


def of(model_type: str) -> ModelFacts:
    return facts(tiny_config(model_type))


@pytest.mark.parametrize(
    "model_type",
    ["llama", "gpt2", "gpt_neox", "opt", "falcon", "bloom", "mpt", "gptj", "mixtral", "gemma3",
     "codegen", "xglm", "gpt_bigcode", "ctrl"],
)  # fmt: skip
def test_every_spelling(model_type: str) -> None:
    found = of(model_type)
    assert found.num_layers >= 2
    assert found.hidden_size == 64
    assert found.num_attention_heads == 4
    assert found.head_dim == 16
    assert found.vocab_size == 256


def test_numbers_of_llama() -> None:
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2,
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 9,
        "max_position_embeddings": 77, "torch_dtype": "bfloat16", "tie_word_embeddings": True,
    }  # fmt: skip
    assert facts(config) == ModelFacts(
        model_type="llama", architecture="LlamaForCausalLM", dtype="bfloat16", num_layers=2,
        hidden_size=64, num_attention_heads=4, num_kv_heads=2, head_dim=16, vocab_size=9,
        max_position_embeddings=77, sliding_window=0, tie_word_embeddings=True,
    )  # fmt: skip


def test_nested_text_config_and_window() -> None:
    inner = {
        "num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 5,
        "sliding_window": 16,
    }  # fmt: skip
    assert facts({"model_type": "x", "text_config": inner}).num_layers == 3
    assert facts({"text_config": inner}).sliding_window == 16
    assert facts({"text_config": inner | {"use_sliding_window": False}}).sliding_window == 0


def test_multi_query_and_missing() -> None:
    config = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 3, "multi_query": True}
    assert facts(config).num_kv_heads == 1
    with pytest.raises(InvalidModel, match="vocab_size"):
        facts({"n_layer": 1, "n_embd": 8, "n_head": 2})
