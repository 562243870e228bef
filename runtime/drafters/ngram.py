"""Prompt lookup: what followed the last few tokens when they stood in this text before.

Saxena 2023, "Prompt Lookup Decoding". Keeps where each n-gram of the shortest size stands in a
text, and grows with it: a look costs a few microseconds however long the text is.
"""

from __future__ import annotations

from collections import defaultdict

from fxlm.runtime.drafters.base import Drafter
from fxlm.runtime.sequence import Sequence

MOST_COPIES = 256  # of the shortest n-gram that are looked at, the latest


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
            text = self._texts.get(sequence)
            if text is None:
                text = self._texts[sequence] = _Text(self.shortest)
            text.update(sequence.token_ids)
            found.append(self._look_up(text, sequence.token_ids, limit))
        return found

    def finish(self, sequence: Sequence) -> None:
        """See `Drafter.finish`."""
        self._texts.pop(sequence, None)

    def _look_up(self, text: _Text, tokens: list[int], limit: int) -> list[int]:
        """What follows the earlier copy of the end of ``tokens``; empty if there is none."""
        last = len(tokens) - 1
        best, follows = 0, 0
        for end in text.copies(tokens):
            size = self.shortest
            while size < min(self.longest, end + 1) and tokens[end - size] == tokens[last - size]:
                size += 1
            if size > best:
                best, follows = size, end + 1
                if size == self.longest:
                    break
        if not best:
            return []
        found = tokens[follows : follows + limit]
        period = len(found)  # a copy that runs into the end goes on with itself
        while len(found) < limit:
            found.append(found[len(found) - period])
        return found


class _Text:
    """Where the n-grams of one size end in a text that grows."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._ends: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        self._length = 0

    def update(self, tokens: list[int]) -> None:
        """Add the tokens that are new."""
        size = self._size
        for end in range(max(self._length, size - 1), len(tokens)):
            self._ends[tuple(tokens[end - size + 1 : end + 1])].append(end)
        self._length = len(tokens)

    def copies(self, tokens: list[int]) -> list[int]:
        """Ends of the earlier copies of the last n-gram, the latest first, not too many."""
        if len(tokens) < self._size:
            return []
        return self._ends[tuple(tokens[-self._size :])][-2 : -2 - MOST_COPIES : -1]
