"""Quantization schemes: what ``--quantization`` may say, typed.

A text such as ``int4,down_proj=int8,head=int8`` names a scheme for all linear layers, then
exceptions: a regular expression that is searched in the module's path, or ``head``, the layer
that gives the logits and which is left alone unless it is named. ``none`` leaves a layer alone.
Not here: who applies it (the pass `quantize`, ``fxlm quantize``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from fxlm.compiler.errors import InvalidOption
from fxlm.compiler.nearest import hint

HEAD = "head"
LEAST_GROUP = 16  # what the kernels take; see fxlm.compiler.ops.quantized
OPTION = "--quantization"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """How weights of linear layers are rounded.

    Attributes:
        name: as users write it.
        kind: ``int`` or ``fp8`` (float8_e4m3fn) codes.
        bits: of a code.
        block: (outputs, inputs) that share a scale; 0: all.
        symmetric: without zero points.
        activation: ``none``: inputs stay as they are; ``int8``: each token's are rounded.
    """

    name: str
    kind: Literal["int", "fp8"]
    bits: int = 8
    block: tuple[int, int] = (1, 0)
    symmetric: bool = True
    activation: Literal["none", "int8"] = "none"

    def fit(self, inputs: int) -> Scheme:
        """The scheme for a layer of ``inputs``: groups of integers are halved until they divide
        them, down to `LEAST_GROUP`; then a row is one group."""
        rows, group = self.block
        if self.kind == "fp8":
            return self
        while group >= LEAST_GROUP and inputs % group:
            group //= 2
        return replace(self, block=(rows, 0 if group < LEAST_GROUP or group >= inputs else group))


def _int4(name: str, group: int, activation: Literal["none", "int8"] = "none") -> Scheme:
    return Scheme(
        name=name, kind="int", bits=4, block=(1, group), symmetric=False, activation=activation
    )


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(name="int8", kind="int", activation="int8"),
        Scheme(name="int8wo", kind="int"),
        _int4("int4", 128),
        _int4("int4-g32", 32),
        _int4("int4a8", 128, "int8"),
        _int4("int4a8-g32", 32, "int8"),
        Scheme(name="fp8", kind="fp8", block=(0, 0)),
        Scheme(name="fp8-channel", kind="fp8"),
        Scheme(name="fp8-block", kind="fp8", block=(128, 128)),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """A parsed ``--quantization``.

    Attributes:
        default: of every layer that no rule names; None: left alone.
        rules: (pattern, scheme or None); the last that matches counts.
    """

    default: Scheme | None
    rules: tuple[tuple[str, Scheme | None], ...] = ()

    def scheme_of(self, path: str, is_head: bool = False) -> Scheme | None:
        """The scheme of the linear layer at a module path; None: it stays as it is."""
        found = None if is_head else self.default
        for pattern, scheme in self.rules:
            if is_head if pattern == HEAD else re.search(pattern, path):
                found = scheme
        return found

    def without(self, paths: list[str]) -> Quantization:
        """The same, with the layers at these paths left alone."""
        added = tuple((f"^{re.escape(path)}$", None) for path in paths)
        return replace(self, rules=(*self.rules, *added))


def parse_quantization(text: str) -> Quantization:
    """Parse ``SCHEME[,PATTERN=SCHEME...]``.

    Raises:
        InvalidOption: an unknown scheme, or a pattern that is no regular expression.
    """
    first, *rest = [part.strip() for part in text.split(",")]
    rules = tuple(_rule(part, text) for part in rest)
    return Quantization(default=_scheme(first, text), rules=rules)


def _rule(part: str, text: str) -> tuple[str, Scheme | None]:
    pattern, equals, name = part.rpartition("=")
    if not equals or not pattern:
        raise InvalidOption(OPTION, text, f"{part!r} is no PATTERN=SCHEME, e.g. head=int8")
    try:
        re.compile(pattern)
    except re.error as error:
        reason = f"{pattern!r} is no regular expression: {error}"
        raise InvalidOption(OPTION, text, reason) from error
    return pattern, _scheme(name, text)


def _scheme(name: str, text: str) -> Scheme | None:
    if name == "none":
        return None
    if name not in SCHEMES:
        near = hint(name, SCHEMES)
        known = ", ".join([*SCHEMES, "none"])
        words = f"{name!r} is no scheme; {near and f'{near} '}there are {known}"
        raise InvalidOption(OPTION, text, words)
    return SCHEMES[name]
