"""Suffix decoding: the longest end of a text that stood somewhere before, and what came next.

Looks in the sequence itself and in earlier outputs; where the copies go on differently, the more
frequent way is taken for as long as its share is large enough (Oliaro et al. 2024,
"SuffixDecoding"). No tree is kept: texts are arrays, found by their pairs of tokens, and the
copies are compared token by token, a few microseconds as a rule.
"""

from __future__ import annotations

from array import array

from fxlm.runtime.drafters.base import Drafter
from fxlm.runtime.sequence import Sequence

NO_TOKEN = -1  # between two outputs
MOST_COPIES = 64  # the latest ones; more tell nothing more
MOST_TOKENS = 1 << 20  # of earlier outputs, some 100 MiB


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
        tail = token_ids[: -self.max_depth - 1 : -1]
        places = [own] if sequence.request.cache_salt else [own, *self._earlier]
        best, ends, where = 0, list[int](), own
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
        self.count = 0
        self._tokens = array("q")
        self._pairs: dict[tuple[int, int], array[int]] = {}  # -> places of the second token

    @property
    def size(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: list[int]) -> None:
        """Add tokens at the end."""
        last = self._tokens[-1] if self._tokens else NO_TOKEN
        for place, token in enumerate(tokens, len(self._tokens)):
            if last != NO_TOKEN and token != NO_TOKEN:
                places = self._pairs.get((last, token))
                if places is None:
                    places = self._pairs[last, token] = array("q")
                places.append(place)
            last = token
        self._tokens.extend(tokens)

    def find(self, tail: list[int]) -> tuple[int, list[int]]:
        """The longest beginning of ``tail`` (a text backwards) and where its copies end.

        A copy at the very end is the text itself and does not count. Shorter than two: none.
        """
        tokens, most = self._tokens, len(tail)
        places = self._pairs.get((tail[1], tail[0]))
        best, ends = 0, list[int]()
        for end in places[-MOST_COPIES:] if places else ():
            if end + 1 == len(tokens):
                continue
            length, room = 2, min(most, end + 1)
            while length < room and tokens[end - length] == tail[length]:
                length += 1
            if length > best:
                best, ends = length, []
            if length == best:
                ends.append(end)
        return best, ends

    def follow(self, ends: list[int], most: int, least_share: float) -> list[int]:
        """What mostly follows the copies, up to ``most`` tokens; of equals the smallest."""
        tokens, least = self._tokens, least_share * len(ends)
        found: list[int] = []
        while len(found) < most:
            nexts: dict[int, list[int]] = {}
            for end in ends:
                if end + 1 < len(tokens) and tokens[end + 1] != NO_TOKEN:
                    nexts.setdefault(tokens[end + 1], []).append(end + 1)
            if not nexts:
                break
            token = min(nexts, key=lambda token: (-len(nexts[token]), token))
            ends = nexts[token]
            if len(ends) < least:
                break
            found.append(token)
        return found
