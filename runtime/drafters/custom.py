"""A drafter of the user's own, by the name of its class."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from fxlm.compiler.errors import InvalidOption
from fxlm.runtime.drafters.base import Drafter
from fxlm.runtime.options import import_file
from fxlm.runtime.sequence import Sequence
from fxlm.runtime.speculative_config import OPTION, SpeculativeConfig
from fxlm.runtime.step import WorkerSpec

FIELD = f"{OPTION}.model"


def custom_drafter(config: SpeculativeConfig, spec: WorkerSpec) -> Drafter:
    """An object of the class that ``config.model`` names, ``package.module.Class`` or
    ``file.py:Class``, called with both arguments of this function.

    Raises:
        InvalidOption: there is no such class, it cannot be called so, or it has no ``propose``.
    """
    name = str(config.model)
    found = _find(name)
    try:
        drafter = found(config, spec)
    except Exception as error:  # whatever the user's class raises
        reason = f"its class was called with (config, spec) and raised {_text(error)}"
        raise InvalidOption(FIELD, name, reason) from error
    if not callable(getattr(drafter, "propose", None)):
        raise InvalidOption(FIELD, name, "it has no method propose(sequences, limits)")
    return _Guarded(drafter)


class _Guarded(Drafter):
    """An object that has ``propose`` and perhaps ``finish``, and that may read tokens only.

    Attributes:
        inner: that object.
    """

    def __init__(self, drafter: Any) -> None:
        self.name = getattr(drafter, "name", "") or type(drafter).__name__
        self.inner = drafter
        self._finish = getattr(drafter, "finish", None)

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[list[int]]:
        """See `Drafter.propose`."""
        before = [(s, s.token_ids, list(s.token_ids)) for s in sequences]
        try:
            found: list[list[int]] = self.inner.propose(sequences, limits)
        finally:
            changed = [item for item in before if item[0].token_ids != item[2]]
            for sequence, held, tokens in changed:
                sequence.token_ids, held[:] = held, tokens
        if changed:
            raise TypeError("it changed token_ids, which are to be read only")
        return found

    def finish(self, sequence: Sequence) -> None:
        """See `Drafter.finish`."""
        if self._finish is not None:
            self._finish(sequence)


def _find(name: str) -> Any:
    file, colon, attribute = name.rpartition(":")
    if colon:
        if not Path(file).is_file():
            raise InvalidOption(FIELD, name, "write FILE.py:CLASS with a file that exists")
        module: Any = import_file(Path(file), FIELD)
    else:
        file, _, attribute = name.rpartition(".")
        try:
            module = importlib.import_module(file) if file else None
        except Exception as error:  # whatever the user's module raises while it is imported
            reason = f"{file} does not import: {_text(error)}"
            raise InvalidOption(FIELD, name, reason) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        remedy = "write package.module.Class or file.py:Class"
        raise InvalidOption(FIELD, name, f"there is no class {attribute!r}; {remedy}")
    return found


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
