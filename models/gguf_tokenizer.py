"""The tokenizer in a GGUF header, as tokenizer.json and tokenizer_config.json.

Byte-level BPE (``tokenizer.ggml.model`` gpt2) is vocabulary, merges, and a pattern that splits the
text first; the file names the pattern only (``tokenizer.ggml.pre``), and a wrong one would give
other tokens without a word, so a name that is not in `SPLITS` is refused. SentencePiece BPE
(``llama``) has scores for merges. Source of the patterns: llama.cpp's ``llama-vocab.cpp``, and the
tokenizer.json of the models. Not here: other kinds (WordPiece, Unigram, RWKV).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxlm.compiler.errors import InvalidModel

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# Name of a pattern -> the pattern; empty: that of GPT-2, which the byte-level step brings itself.
SPLITS = {
    "default": "", "gpt-2": "", "gpt2": "", "phi-2": "", "llama-bpe": LLAMA3, "llama3": LLAMA3,
    "llama-v3": LLAMA3, "smaug-bpe": LLAMA3, "qwen2": QWEN2, "deepseek-r1-qwen": QWEN2,
    "smollm": "",
}  # fmt: skip
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")  # a word of the vocabulary is not merged
SINGLE_DIGITS = ("smollm",)
CONTROL, USER_DEFINED = 3, 4  # types of tokens


def write_tokenizer(values: Mapping[str, Any], directory: Path, where: object) -> None:
    """Write the tokenizer's files, and the chat template.

    Args:
        values: of the header.
        directory: exists.
        where: the file, for errors.

    Raises:
        InvalidModel: a kind or a pattern that is not known.
    """
    tokens: list[str] = values.get("tokenizer.ggml.tokens", [])
    kind = values.get("tokenizer.ggml.model")
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in makers or not tokens:
        raise InvalidModel(
            f"the tokenizer of {where} is {kind!r}; read are {', '.join(makers)}: give another "
            "with --tokenizer DIR"
        )
    tokenizer = makers[kind](values, tokens, where)
    _add_tokens(tokenizer, values, tokens)
    _add_ends(tokenizer, values, tokens, default=kind == "llama")
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {
        f"{name}_token": tokens[values[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in values
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, **named}))
    if template := values.get("tokenizer.chat_template"):
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _byte_level(values: Mapping[str, Any], tokens: list[str], where: object) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = values.get("tokenizer.ggml.pre", "default")
    if name not in SPLITS:
        raise InvalidModel(
            f"{where} splits text by the pattern {name!r}, which is not known; known are "
            f"{', '.join(SPLITS)}: give the tokenizer with --tokenizer DIR"
        )
    merges = [tuple(m.split(" ", 1)) for m in values.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    _require_merges(merges, vocabulary, where)
    bpe: Any = models.BPE
    tokenizer: Any = Tokenizer(
        bpe(vocab=vocabulary, merges=merges, ignore_merges=name in WHOLE_WORDS)
    )
    steps: list[Any] = [pre_tokenizers.ByteLevel(False, use_regex=not SPLITS[name])]
    if SPLITS[name]:
        steps.insert(0, pre_tokenizers.Split(Regex(SPLITS[name]), "isolated"))
    elif name in SINGLE_DIGITS:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if SPLITS[name] == QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _require_merges(
    merges: list[tuple[str, ...]], vocabulary: Mapping[str, int], where: object
) -> None:
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise InvalidModel(
                f"tokenizer.ggml.merges of {where} has {' '.join(merge)!r}, which does not make a "
                "token of two others; download the file again"
            )


def _sentencepiece(values: Mapping[str, Any], tokens: list[str], where: object) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = values.get("tokenizer.ggml.scores")
    if not scores:
        raise InvalidModel(f"{where} has a SentencePiece tokenizer without scores")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    bpe: Any = models.BPE
    unknown = tokens[values.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer: Any = Tokenizer(
        bpe(
            vocab=vocabulary, merges=_merges(vocabulary, tokens, scores), unk_token=unknown,
            fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    prefix = bool(values.get("tokenizer.ggml.add_space_prefix", True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([*undo, *strip])
    return tokenizer


def _merges(
    vocabulary: Mapping[str, int], tokens: list[str], scores: list[float]
) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the best token first, as SentencePiece merges."""
    found = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _add_tokens(tokenizer: Any, values: Mapping[str, Any], tokens: list[str]) -> None:
    from tokenizers import AddedToken

    kinds: list[int] = values.get("tokenizer.ggml.token_type", [1] * len(tokens))
    special = [
        AddedToken(t, special=True) for t, k in zip(tokens, kinds, strict=True) if k == CONTROL
    ]
    plain = [t for t, k in zip(tokens, kinds, strict=True) if k == USER_DEFINED]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])


def _add_ends(tokenizer: Any, values: Mapping[str, Any], tokens: list[str], default: bool) -> None:
    """Tokens that every text begins or ends with."""
    from tokenizers import processors

    ends: dict[str, tuple[str, int]] = {}
    for name, key in (("bos", "add_bos_token"), ("eos", "add_eos_token")):
        number = values.get(f"tokenizer.ggml.{name}_token_id")
        wanted = values.get(f"tokenizer.ggml.{key}", default and name == "bos")
        if wanted and number is not None:
            ends[name] = (tokens[number], number)
    if not ends:
        return
    pieces = [ends["bos"][0]] if "bos" in ends else []
    pieces += ["$A"] + ([ends["eos"][0]] if "eos" in ends else [])
    template: Any = processors.TemplateProcessing
    steps: list[Any] = [template(single=pieces, special_tokens=list(ends.values()))]
    if values.get("tokenizer.ggml.model") == "gpt2":
        steps.insert(0, processors.ByteLevel(trim_offsets=False))
    tokenizer.post_processor = processors.Sequence(steps)
