"""The models that ship with fxlm, by name. Importing this costs no torch.

`bundled` is the embedded default of `fxlm serve`; `bundled-draft` shares its
tokenizer and is at least eight times smaller, for speculative decoding.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent

BUNDLED: dict[str, Path] = {"bundled": _HERE / "main", "bundled-draft": _HERE / "draft"}

__all__ = ["BUNDLED"]
