"""SpeculativeConfig: what a user may choose about drafting, with vLLM's keys.

Here: the keys of ``--speculative-config``, their check and their defaults. Not here: drafting.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NoReturn, get_args

import msgspec

from fxlm.compiler.errors import InvalidOption
from fxlm.compiler.nearest import hint

OPTION = "speculative_config"
MOST_TOKENS = 64

Method = Literal["ngram", "suffix", "draft_model", "custom_class"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculativeConfig:
    """How tokens are drafted.

    Attributes:
        method: ``ngram``, ``suffix``, ``draft_model`` or ``custom_class``; None: a draft model
            if ``model`` is given.
        num_speculative_tokens: most tokens a draft, 1..64; None: 4, and 16 with ``suffix``.
        model: of ``draft_model``, a directory, hub id or ``bundled-draft``; of ``custom_class``,
            ``package.module.Class`` or ``file.py:Class``.
        revision: of a draft model's hub id.
        quantization: of a draft model's weights, as ``--quantization``; None: as it has them.
        max_model_len: context of the draft model; beyond it nothing is drafted. None: the
            target's, or what the draft was made for.
        enforce_eager: interpret the draft model's graph; None: like the target's.
        prompt_lookup_max, prompt_lookup_min: bounds of the n-grams that ``ngram`` looks up.
        suffix_decoding_max_tree_depth: bound of matched and drafted tokens together.
        suffix_decoding_max_cached_requests: earlier outputs that ``suffix`` keeps; 0: none.
        suffix_decoding_max_spec_factor: tokens drafted per token matched, at most.
        suffix_decoding_min_token_prob: a token is drafted if that share of its copies says so.
        adaptive: shorten drafts, down to none, where they do not pay.
    """

    method: Method | None = None
    num_speculative_tokens: int | None = None
    model: str | None = None
    revision: str | None = None
    quantization: str | None = None
    max_model_len: int | None = None
    enforce_eager: bool | None = None
    prompt_lookup_max: int | None = None
    prompt_lookup_min: int | None = None
    suffix_decoding_max_tree_depth: int = 24
    suffix_decoding_max_cached_requests: int = 10000
    suffix_decoding_max_spec_factor: float = 1.0
    suffix_decoding_min_token_prob: float = 0.1
    adaptive: bool = True

    def __post_init__(self) -> None:
        if self.method is None and self.model is None:
            _refuse("method", None, "give ngram, suffix, draft_model or custom_class")
        needs_model = self.kind in ("draft_model", "custom_class")
        if needs_model and not self.model:
            _refuse("model", self.model, f"method {self.kind} needs one")
        if self.model and not needs_model:
            _refuse("model", self.model, f"method {self.kind} takes none")
        if self.prompt_lookup_max is not None and self.prompt_lookup_max < 1:
            _refuse("prompt_lookup_max", self.prompt_lookup_max, "must be at least 1")
        if not 1 <= self.most <= MOST_TOKENS:
            _refuse("num_speculative_tokens", self.most, f"use 1 to {MOST_TOKENS}")
        if not 1 <= self.lookup[0] <= self.lookup[1]:
            _refuse("prompt_lookup_min", self.lookup[0], f"use 1 to {self.lookup[1]} (the max)")
        if self.max_model_len is not None and self.max_model_len < 2:
            _refuse("max_model_len", self.max_model_len, "must be at least 2")
        self._check_suffix()

    def _check_suffix(self) -> None:
        if self.suffix_decoding_max_tree_depth < 2:
            name = "suffix_decoding_max_tree_depth"
            _refuse(name, self.suffix_decoding_max_tree_depth, "must be at least 2")
        for name, low, high in (
            ("suffix_decoding_max_cached_requests", 0, None),
            ("suffix_decoding_max_spec_factor", 0, None),
            ("suffix_decoding_min_token_prob", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value < math.inf or (high is not None and value > high):
                bound = f"must be finite and at least {low}"
                _refuse(name, value, bound if high is None else f"{bound} and at most {high}")

    @property
    def kind(self) -> Method:
        """The method, resolved."""
        return self.method or "draft_model"

    @property
    def most(self) -> int:
        """Most tokens a draft, resolved."""
        if self.num_speculative_tokens is not None:
            return self.num_speculative_tokens
        return 16 if self.kind == "suffix" else 4

    @property
    def lookup(self) -> tuple[int, int]:
        """Least and greatest n of an n-gram, resolved: 2 to 5, or the one that is given."""
        longest = self.prompt_lookup_max
        if longest is None:
            longest = max(self.prompt_lookup_min or 0, 5)
        shortest = self.prompt_lookup_min
        return (min(2, longest) if shortest is None else shortest), longest


def speculative_config(given: Any) -> SpeculativeConfig:
    """The config of a mapping, of its JSON text, or as it is.

    Raises:
        InvalidOption: no JSON, an unknown key (the nearest is named) or a wrong value.
    """
    if isinstance(given, SpeculativeConfig):
        return given
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise InvalidOption(OPTION, given, f"it is no JSON ({error})") from None
    if not isinstance(given, Mapping):
        raise InvalidOption(OPTION, given, 'give an object, e.g. {"method": "ngram"}')
    known = [field.name for field in fields(SpeculativeConfig)]
    for name in given:
        if name not in known:
            near = hint(str(name), known, f"known: {', '.join(known)}")
            _refuse(name, given[name], f"there is no such key; {near}")
    try:
        return msgspec.convert(dict(given), SpeculativeConfig)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$.")
        field = place.rstrip("`")
        if field == "method" and isinstance(given["method"], str):
            reason = hint(given["method"], METHODS, f"use {', '.join(METHODS)}")
        _refuse(field, given.get(field), reason)


def _refuse(key: str, value: object, remedy: str) -> NoReturn:
    raise InvalidOption(f"{OPTION}.{key}", value, remedy)
