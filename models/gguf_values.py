"""What the values of a GGUF header must be before a config and a tokenizer are made of them.

A value of another type, or a token that is not in the vocabulary, means a damaged file or a
converter of another mind; unchecked, it would end in an error of a library that knows nothing of
the file. Not here: the file's own layout (`fxlm.models.gguf_file`), what the values mean
(`gguf_names`, `gguf_tokenizer`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fxlm.compiler.errors import InvalidModel

MAX_COUNT = 2**31  # no size, length or token id is so large
_SURROGATE = re.compile("[\ud800-\udfff]")  # what bytes that are no UTF-8 became


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_COUNT


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and _SURROGATE.search(value) is None


def _all(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(check(each) for each in value)


def _are_texts(value: Any) -> bool:
    """As `_all` of `_is_text`, for hundreds of thousands."""
    return (
        isinstance(value, list)
        and all(isinstance(each, str) for each in value)
        and _is_text("".join(value))
    )


# What a value is -> how that is checked.
KINDS: dict[str, Callable[[Any], bool]] = {
    "a whole number from 0 to 2**31 - 1": _is_count,
    "a finite number": _is_number,
    "text in UTF-8": _is_text,
    "true or false": lambda value: value in (0, 1) and not isinstance(value, float),
    "a list of texts in UTF-8": _are_texts,
    "a list of finite numbers": _all(_is_number),
    "a list of whole numbers": _all(lambda value: type(value) is int),
}
COUNT, NUMBER, TEXT, FLAG, TEXTS, NUMBERS, INTEGERS = KINDS
_TOKENIZER = {
    "model": TEXT, "pre": TEXT, "tokens": TEXTS, "merges": TEXTS, "scores": NUMBERS,
    "token_type": INTEGERS, "add_bos_token": FLAG, "add_eos_token": FLAG, "add_space_prefix": FLAG,
}  # fmt: skip
_ROPE = {
    "freq_base": NUMBER, "scaling.type": TEXT, "scaling.original_context_length": COUNT,
    "scaling.factor": NUMBER, "scaling.attn_factor": NUMBER,
}  # fmt: skip
_NUMBERS = ("attention.layer_norm_rms_epsilon", "attn_logit_softcapping", "final_logit_softcapping")


def require_kinds(
    values: Mapping[str, Any], prefix: str, keys: Iterable[str], where: object
) -> None:
    """Check each value that is read.

    Args:
        values: of the header.
        prefix: of the architecture's own keys.
        keys: those of the config, below the prefix.
        where: the file, for errors.

    Raises:
        InvalidModel: a value is of another kind, or a list or a token id does not fit the tokens.
    """
    kinds = {f"{prefix}.{key}": NUMBER if key in _NUMBERS else COUNT for key in keys}
    kinds |= {f"{prefix}.rope.{key}": kind for key, kind in _ROPE.items()}
    kinds |= {f"tokenizer.ggml.{key}": kind for key, kind in _TOKENIZER.items()}
    kinds |= {key: COUNT for key in values if _is_token(key)}
    kinds["tokenizer.chat_template"] = TEXT
    for key, kind in kinds.items():
        if key in values and not KINDS[kind](values[key]):
            raise _refused(where, key, values[key], f"must be {kind}")
    _require_tokens(values, where)


def _is_token(key: str) -> bool:
    return key.startswith("tokenizer.ggml.") and key.endswith("_token_id")


def _require_tokens(values: Mapping[str, Any], where: object) -> None:
    """Lists beside the tokens are as long, and ids are of tokens."""
    tokens = values.get("tokenizer.ggml.tokens")
    if not tokens:
        return
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        if key in values and len(values[key]) != len(tokens):
            rule = f"must have one for each of {len(tokens)} tokens"
            raise _refused(where, key, values[key], rule)
    for key, value in values.items():
        if _is_token(key) and value >= len(tokens):
            raise _refused(where, key, value, f"must be below {len(tokens)}, the number of tokens")


def _refused(where: object, key: str, value: object, rule: str) -> InvalidModel:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return InvalidModel(
        f"{key} in the header of {where} is {shown}, {rule}; download or convert the file again"
    )
