"""Suffix decoding: the longest end of a text that stood somewhere before, and what came next.

Looks in the sequence itself and in earlier outputs; where the copies go on differently, the more
frequent way is taken for as long as its share is large enough (Oliaro et al. 2024,
"SuffixDecoding"). No tree is kept: texts are arrays, found by their pairs of tokens, and the
copies are compared together.
"""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

from fxlm.runtime.drafters.base import Drafter
from fxlm.runtime.sequence import Sequence

Ints = npt.NDArray[np.int64]

NO_TOKEN = -1  # between two outputs
MOST_COPIES = 64  # the latest ones; more tell nothing more
MOST_TOKENS = 1 << 20  # of earlier outputs, some 100 MiB
START_SIZE = 1024


class SuffixDrafter(Drafter):
    """Drafts from copies.

    Args:
        max_depth: tokens matched and drafted together, at most.
        max_cached_requests: earlier outputs kept; the oldest half goes at once when they are
            more, or too long together. Outputs of requests with a ``cache_salt`` are not kept,
            and these look at their own text alone.
        max_spec_factor: tokens drafted for each token matched, at most.
        min_token_prob: least share of the copies that go on as drafted.
    """

    def __init__(
        self,
        *,
        max_depth: int,
        max_cached_requests: int,
        max_spec_factor: float,
        min_token_prob: float,
    ) -> None:
        self.max_depth = max_depth
        self.max_cached_requests = max_cached_requests
        self.max_spec_factor = max_spec_factor
        self.min_token_prob = min_token_prob
        self._own: dict[Sequence, _Texts] = {}
        self._earlier = [_Texts(), _Texts()]  # the younger half, the older half

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[list[int]]:
        """See `Drafter.propose`."""
        return [self._guess(s, limit) for s, limit in zip(sequences, limits, strict=True)]

    def _guess(self, sequence: Sequence, limit: int) -> list[int]:
        own = self._own.setdefault(sequence, _Texts())
        token_ids = sequence.token_ids
        own.extend(token_ids[own.size :])
        if len(token_ids) < 2:
            return []
        tail = np.array(token_ids[: -self.max_depth - 1 : -1], np.int64)
        places = [own] if sequence.request.cache_salt else [own, *self._earlier]
        best, ends, where = 0, np.zeros(0, np.int64), own
        for texts in places:
            length, found = texts.find(tail)
            if length > best:
                best, ends, where = length, found, texts
        most = min(limit, int(self.max_spec_factor * best), self.max_depth - best)
        return where.follow(ends, most, self.min_token_prob)

    def finish(self, sequence: Sequence) -> None:
        """Keep the output for others."""
        self._own.pop(sequence, None)
        output = sequence.token_ids[sequence.num_prompt :]
        if not output or sequence.request.cache_salt or self.max_cached_requests < 1:
            return
        young = self._earlier[0]
        half = max(self.max_cached_requests // 2, 1)
        if young.count >= half or young.size >= MOST_TOKENS // 2:
            old = [young] if self.max_cached_requests > 1 else []
            young = _Texts()
            self._earlier = [young, *old]
        young.extend([*output, NO_TOKEN])
        young.count += 1


class _Texts:
    """Tokens one after another, and where each pair of them stands.

    Attributes:
        size: tokens.
        count: texts, where they are counted.
    """

    def __init__(self) -> None:
        self.size = 0
        self.count = 0
        self._tokens: Ints = np.full(START_SIZE, NO_TOKEN, np.int64)
        self._pairs: dict[tuple[int, int], array[int]] = {}  # -> places of the second token

    def extend(self, tokens: list[int]) -> None:
        """Add tokens at the end."""
        begin, end = self.size, self.size + len(tokens)
        if end > len(self._tokens):
            grown = np.full(2 * end, NO_TOKEN, np.int64)
            grown[:begin] = self._tokens[:begin]
            self._tokens = grown
        self._tokens[begin:end] = tokens
        last = int(self._tokens[begin - 1]) if begin else NO_TOKEN
        for place, token in enumerate(tokens, begin):
            if last != NO_TOKEN and token != NO_TOKEN:
                self._pairs.setdefault((last, token), array("q")).append(place)
            last = token
        self.size = end

    def find(self, tail: Ints) -> tuple[int, Ints]:
        """The longest beginning of ``tail`` (a text backwards) and where its copies end.

        A copy at the very end is the text itself and does not count. Shorter than two: none.
        """
        none = np.zeros(0, np.int64)
        places = self._pairs.get((int(tail[1]), int(tail[0])))
        if places is None:
            return 0, none
        ends = np.array(places[-MOST_COPIES:], np.int64)
        ends = ends[ends + 1 < self.size]
        if not len(ends):
            return 0, none
        before = ends[:, None] - np.arange(len(tail))
        same = (before >= 0) & (self._tokens[np.maximum(before, 0)] == tail)
        lengths = np.cumprod(same, axis=1).sum(axis=1)
        best = int(lengths.max())
        return best, ends[lengths == best]

    def follow(self, ends: Ints, most: int, least_share: float) -> list[int]:
        """What mostly follows the copies, up to ``most`` tokens."""
        total = len(ends)
        found: list[int] = []
        while len(found) < most and len(ends):
            after = self._tokens[np.minimum(ends + 1, self.size)]  # of the end: NO_TOKEN
            after[ends + 1 >= self.size] = NO_TOKEN
            tokens, counts = np.unique(after[after != NO_TOKEN], return_counts=True)
            if not len(tokens) or counts.max() < least_share * total:
                break
            found.append(int(tokens[counts.argmax()]))
            ends = ends[after == found[-1]] + 1
        return found
