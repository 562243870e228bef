"""Text to token ids and back, over the ``tokenizers`` library.

Reads ``tokenizer.json`` and ``tokenizer_config.json`` as transformers' fast tokenizers do,
without importing transformers (nor torch): the server's process stays light. Where there is
no ``tokenizer.json`` transformers converts what there is. Not here: chat templates
(`fxlm.models.chat`), text that grows token by token (`fxlm.runtime.detokenize`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from fxlm.compiler.errors import InvalidModel
from fxlm.models.checkpoint import read_json

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
          "mask_token")  # fmt: skip
_CLEAN = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
          (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip


class Tokenizer:
    """A checkpoint's tokenizer.

    Attributes:
        special_tokens: named special tokens, e.g. ``{"eos_token": "</s>"}``; templates see them.
        bos_token_id, eos_token_id, pad_token_id: None where there is none.
        eos_token_ids: every token that ends an output, by generation_config, config and name.
        vocab_size: ids are below it, added tokens included.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any] | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        """Take a backend and what ``tokenizer_config.json`` says of it (it is changed)."""
        config = config or {}
        self.backend = backend
        self.special_tokens = named_tokens(config)
        _add_tokens(backend, config, self.special_tokens)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        if {"add_bos_token", "add_eos_token"} & set(config) or backend.post_processor is None:
            backend.post_processor = _post_processor(backend, config, self.special_tokens)
        self._clean = bool(config.get("clean_up_tokenization_spaces")) and (
            type(backend.model).__name__ != "BPE"
            or config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
        )
        self.bos_token_id = self._named("bos_token")
        self.eos_token_id = self._named("eos_token")
        self.pad_token_id = self._named("pad_token")
        named = () if self.eos_token_id is None else (self.eos_token_id,)
        self.eos_token_ids = tuple(dict.fromkeys([*eos_token_ids, *named]))
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._special = {token_id for token_id, token in added.items() if token.special}
        self._decoders = _decoder_types(backend)

    @classmethod
    def open(cls, path: Path | str, *, trust_remote_code: bool = False) -> Tokenizer:
        """Open the tokenizer of a checkpoint directory.

        Raises:
            InvalidModel: there is none, or it is damaged.
        """
        path = Path(path)
        config = _optional(path / "tokenizer_config.json")
        named = _optional(path / "special_tokens_map.json")
        config = {**{k: v for k, v in named.items() if k not in config}, **config}
        backend = _backend(path, trust_remote_code)
        return cls(backend, config, _eos_token_ids(path))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Token ids of each text; runs on several threads."""
        batch = self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids outside the vocabulary give nothing."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        if self._clean:
            for old, new in _CLEAN:
                text = text.replace(old, new)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, even where they are half a character."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if "ByteLevel" in self._decoders:
            return bytes(b for c in token for b in _byte_level(c))
        if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
            return bytes([int(match[1], 16)])
        return str(token).replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    def is_special(self, token_id: int) -> bool:
        """Whether decoding leaves the token out when special tokens are skipped."""
        return token_id in self._special

    def id_of(self, token: str) -> int | None:
        """Id of a token, None if it is not in the vocabulary."""
        found: int | None = self.backend.token_to_id(token)
        return found

    def _named(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.id_of(token)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _backend(path: Path, trust_remote_code: bool) -> tokenizers.Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        return _converted(path, trust_remote_code)
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise InvalidModel(f"{file} is damaged: {error}") from error


def _converted(path: Path, trust_remote_code: bool) -> tokenizers.Tokenizer:
    """Let transformers convert vocab files, SentencePiece or tiktoken models."""
    try:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever is missing there, the checkpoint has no tokenizer
        raise InvalidModel(
            f"{path} has no tokenizer.json, and transformers finds no other: {error}"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise InvalidModel(f"{path} has no fast tokenizer; save one as tokenizer.json")
    return backend


def _content(value: Any) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens that a tokenizer config gives a name, e.g. ``{"eos_token": "</s>"}``."""
    names = [*_NAMED, *(key for key in config if key.endswith("_token") and key not in _NAMED)]
    extra = config.get("extra_special_tokens")
    values = {name: _content(config.get(name)) for name in names}
    if isinstance(extra, Mapping):
        values |= {name: _content(value) for name, value in extra.items()}
    return {name: value for name, value in values.items() if value is not None}


def _add_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]
) -> None:
    """Add the tokens that the config knows and ``tokenizer.json`` does not."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    for _, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        if entry["content"] not in known:
            flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
            options = {flag: entry[flag] for flag in flags if flag in entry}
            backend.add_tokens([tokenizers.AddedToken(entry["content"], **options)])
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    contents = [_content(token) for token in (extra if isinstance(extra, list) else [])]
    for content in [*named.values(), *contents]:
        if content is not None and content not in known:
            token = tokenizers.AddedToken(content, special=True, normalized=False)
            backend.add_special_tokens([token])


def _post_processor(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]
) -> TemplateProcessing:
    """[bos] text [eos], as the config's flags ask."""
    bos = named.get("bos_token") if config.get("add_bos_token") else None
    eos = named.get("eos_token") if config.get("add_eos_token") else None
    single = [*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])]
    pair = [*single, *([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
    special = [(token, backend.token_to_id(token)) for token in (bos, eos) if token]
    return TemplateProcessing(single=single, pair=pair, special_tokens=special)


def _eos_token_ids(path: Path) -> list[int]:
    generation = _optional(path / "generation_config.json").get("eos_token_id")
    if generation is None:
        config = _optional(path / "config.json")
        generation = config.get("eos_token_id")
        if generation is None and isinstance(config.get("text_config"), dict):
            generation = config["text_config"].get("eos_token_id")
    found = generation if isinstance(generation, list) else [generation]
    return [i for i in found if type(i) is int]


def _decoder_types(backend: tokenizers.Tokenizer) -> set[str]:
    """Names of the decoder's parts, e.g. {'ByteLevel'}."""
    if backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    return {state["type"], *(part["type"] for part in state.get("decoders", []))}


def _make_byte_level() -> dict[str, int]:
    """GPT-2's table of printable characters for bytes, inverted."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in kept]
    return {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTE_LEVEL = _make_byte_level()


def _byte_level(character: str) -> bytes:
    byte = _BYTE_LEVEL.get(character)
    return character.encode() if byte is None else bytes([byte])
