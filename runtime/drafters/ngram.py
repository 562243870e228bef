"""Prompt lookup: what followed the last few tokens when they stood in this text before.

Saxena 2023, "Prompt Lookup Decoding". Keeps nothing between steps but the text itself.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fxlm.runtime.drafters.base import Drafter
from fxlm.runtime.sequence import Sequence

START_SIZE = 1024


class NgramDrafter(Drafter):
    """The longest n-gram, ``longest`` down to ``shortest`` tokens, decides; its latest copy.

    Args:
        shortest, longest: bounds of n.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        assert 1 <= shortest <= longest, (shortest, longest)
        self.shortest = shortest
        self.longest = longest
        self._texts: dict[Sequence, _Text] = {}

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[list[int]]:
        """See `Drafter.propose`."""
        found = []
        for sequence, limit in zip(sequences, limits, strict=True):
            text = self._texts.setdefault(sequence, _Text())
            found.append(self._look_up(text.update(sequence.token_ids), limit))
        return found

    def finish(self, sequence: Sequence) -> None:
        """See `Drafter.finish`."""
        self._texts.pop(sequence, None)

    def _look_up(self, tokens: npt.NDArray[np.int64], limit: int) -> list[int]:
        """What follows the earlier copy of the end of ``tokens``; empty if there is none."""
        last = len(tokens) - 1
        ends = np.flatnonzero(tokens[:last] == tokens[last])  # where a copy may end
        best = 0
        for size in range(1, self.longest + 1):
            if size > 1:
                ends = ends[ends >= size - 1]
                ends = ends[tokens[ends - (size - 1)] == tokens[last - (size - 1)]]
            if not len(ends):
                break
            if size >= self.shortest:
                best = int(ends[-1]) + 1
        if not best:
            return []
        period = last + 1 - best  # a copy that runs into the end goes on with itself
        places = best + np.arange(limit) % period
        found: list[int] = tokens[places].tolist()
        return found


class _Text:
    """The tokens of a sequence as an array that grows."""

    def __init__(self) -> None:
        self._tokens: npt.NDArray[np.int64] = np.zeros(START_SIZE, np.int64)
        self._size = 0

    def update(self, token_ids: list[int]) -> npt.NDArray[np.int64]:
        """Add the tokens that are new; gives all of them."""
        size = len(token_ids)
        if size > len(self._tokens):
            grown = np.zeros(2 * size, np.int64)
            grown[: self._size] = self._tokens[: self._size]
            self._tokens = grown
        self._tokens[self._size : size] = token_ids[self._size :]
        self._size = size
        return self._tokens[:size]
