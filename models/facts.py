"""Facts of a model, read from its config whatever the spelling.

Here: numbers that plan memory and requests. Not here: anything a graph shows by itself (the
window of each layer, which layers attend), which is read from the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fxlm.compiler.errors import InvalidModel

# Where the language model of a composite config is.
_NESTS = ("text_config", "language_config", "llm_config", "thinker_config", "decoder")
_SPELLINGS: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "n_embed", "dim"),
    "num_attention_heads": (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
        "attention_heads",
    ),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "max_position_embeddings": (
        "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length",
        "n_ctx", "seq_length", "max_seq_length", "max_target_positions",
    ),
    "vocab_size": ("vocab_size", "padded_vocab_size"),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What is known of a model without building it.

    Attributes:
        model_type: transformers' name of the family.
        architecture: class named by the checkpoint, '' if none.
        dtype: of the checkpoint as config says (``bfloat16``), '' if it says none.
        num_layers: hidden layers.
        hidden_size: width.
        num_attention_heads: query heads (of the widest layer); 0 if it does not attend.
        num_kv_heads: key and value heads.
        head_dim: of a query head.
        vocab_size: logits a token.
        max_position_embeddings: longest context the model was made for; 0 if unbounded.
        sliding_window: tokens seen by a windowed layer; 0 if config names none in use.
        tie_word_embeddings: whether input and output embedding are one tensor.
    """

    model_type: str
    architecture: str
    dtype: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    sliding_window: int
    tie_word_embeddings: bool


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model."""
    for nest in _NESTS:
        inner = config.get(nest)
        if isinstance(inner, Mapping) and _find(inner, "num_layers") is not None:
            return inner
    return config


def num_layers(config: Mapping[str, Any]) -> int | None:
    """Hidden layers by a raw config; None if it leaves them to its class."""
    return _find(text_config(config), "num_layers")


def num_heads(config: Mapping[str, Any]) -> int | None:
    """Query heads (of the widest layer) by a raw config; None if it leaves them to its class."""
    return _find(text_config(config), "num_attention_heads")


def vocab_size(config: Mapping[str, Any]) -> int | None:
    """Logits a token by a raw config; None if it leaves them to its class."""
    return _find(text_config(config), "vocab_size")


def facts(source: Any) -> ModelFacts:
    """Read the facts of a raw config dict, a config object, or a model that has one.

    A config object knows its class's defaults, which ``config.json`` may leave out; prefer it.

    Raises:
        InvalidModel: a number is missing or not positive; names it.
    """
    outer = _as_dict(source)
    config = text_config(outer)
    hidden = _need(config, "hidden_size")
    heads = _find(config, "num_attention_heads") or 0
    kv_heads = _find(config, "num_kv_heads") or (1 if config.get("multi_query") else heads)
    window = config.get("sliding_window") or 0
    if config.get("use_sliding_window") is False:
        window = 0
    return ModelFacts(
        model_type=str(outer.get("model_type", "")),
        architecture=str((outer.get("architectures") or [""])[0]),
        dtype=_dtype(outer) or _dtype(config),
        num_layers=_need(config, "num_layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_first(config.get("head_dim")) or hidden // max(heads, 1),
        vocab_size=_need(config, "vocab_size"),
        max_position_embeddings=_find(config, "max_position_embeddings") or 0,
        sliding_window=_first(window) or 0,
        tie_word_embeddings=bool(
            outer.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
        ),
    )


def _as_dict(source: Any) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    config = getattr(source, "config", source)
    if isinstance(config, Mapping):
        return config
    result = dict(config.to_dict())
    attributes = getattr(type(config), "attribute_map", None) or {}
    result.update({alias: result[name] for alias, name in attributes.items() if name in result})
    for name in (name for names in _SPELLINGS.values() for name in names):
        if name not in result and (value := _attribute(config, name)) is not None:
            result[name] = value
    return result


def _attribute(config: Any, name: str) -> Any:
    """A number that the config computes; None where it has none, or one for each layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers has classes of its own for numbers that differ by layer
        return None


def _first(value: Any) -> int | None:
    """An int, or the largest of a list that has one a layer; None if it is neither."""
    if isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
        return max(int(v) for v in value)
    return int(value) if type(value) is int and value > 0 else None


def _find(config: Mapping[str, Any], fact: str) -> int | None:
    for name in _SPELLINGS[fact]:
        value = _first(config.get(name))
        if value is not None:
            return value
    return None


def _need(config: Mapping[str, Any], fact: str) -> int:
    value = _find(config, fact)
    if value is None:
        raise InvalidModel(
            f"config.json says no {fact}: looked for {', '.join(_SPELLINGS[fact])} as a positive "
            f"integer in a config of type {config.get('model_type', '?')!r}"
        )
    return value


def _dtype(config: Mapping[str, Any]) -> str:
    value = config.get("dtype") or config.get("torch_dtype") or ""
    return str(value).removeprefix("torch.")
