"""Token ids to text, as they come.

Here: `Detokenizer`, incremental decoding over any tokenizer that can decode, and
`StopStrings`. Not here: requests (``outputs``), tokenizers (``models``).
"""

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "�"  # what decoders write for bytes that are not UTF-8, or not yet
CONTEXT_TOKENS = 6  # of the prompt: decoders treat the start of a text specially (spaces)
MAX_DIRTY_TOKENS = 16  # a character has 4 bytes at most: more unfinished tokens are garbage
SYNC_TOKENS = 8  # kept when a window of garbage is cut ...
SYNC_CHARACTERS = 4  # ... if they have so many: UTF-8 finds its feet within 4 bytes
MAX_WINDOW = 64  # tokens; reached by a long run of tokens without text only


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...


class Detokenizer:
    """Text of one completion, as far as it is certain.

    Decoding a token alone is wrong: a character may be split over tokens, and many decoders treat
    the first token of a text specially. So a window of tokens is decoded, beginning at a point
    where the text was complete; what it has beyond the text given out already is new. Text that
    ends in a replacement character is held back until the next token, or `flush`. The text of
    all pieces is the text of decoding all tokens at once, however they come.

    Args:
        tokenizer: only ``decode`` is used.
        prompt: token ids before the completion; its last few give context.
        skip_special_tokens: leave special tokens out.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = list(prompt[-CONTEXT_TOKENS:])
        self._num_clean = len(self._window)  # leading tokens of the window with certain text
        self._given = len(_certain(self._decode())) if self._window else 0  # characters

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; gives the text that became certain."""
        return "".join([self._push(token) for token in token_ids])

    def flush(self) -> str:
        """The text held back, incomplete characters as U+FFFD; nothing may follow."""
        text = self._decode()
        rest = text[self._given :]
        self._given = len(text)
        return rest

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip)

    def _push(self, token: int) -> str:
        self._window.append(token)
        text = self._decode()
        num_dirty = len(self._window) - self._num_clean
        if text.endswith(REPLACEMENT) or len(text) <= self._given:
            # tokens without text (special ones) are no context: the window waits for some
            return self._cut(_certain(text)) if num_dirty > MAX_DIRTY_TOKENS else ""
        new = text[self._given :]
        self._window = self._window[-num_dirty:]  # these tokens are the context of the next
        self._num_clean = num_dirty
        self._given = len(self._decode())
        return new

    def _cut(self, text: str) -> str:
        """Keep the window from growing while garbage lasts; gives the text that is certain."""
        new = text[self._given :]
        self._given = max(len(text), self._given)
        window, self._window = self._window, self._window[-SYNC_TOKENS:]
        given = len(_certain(self._decode()))
        if given < SYNC_CHARACTERS and len(window) < MAX_WINDOW:
            self._window = window
            return new
        self._given = given
        self._num_clean = 0
        return new


def _certain(text: str) -> str:
    """All but a last character that later bytes may turn into another."""
    return text.removesuffix(REPLACEMENT)


class StopStrings:
    """Looks for the earliest of some strings in a growing text.

    Args:
        stops: non-empty strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = list(stops)
        self._longest = max((len(stop) for stop in stops), default=0)

    def find(self, text: str, num_new: int) -> tuple[int, str] | None:
        """Where the earliest match begins, and the string; the longest of those that begin there.

        Args:
            text: everything so far.
            num_new: characters of it not searched before.
        """
        matches = []
        for stop in self.stops:
            place = text.find(stop, max(len(text) - num_new - len(stop) + 1, 0))
            if place >= 0:
                matches.append((place, -len(stop), stop))
        if not matches:
            return None
        place, _, stop = min(matches)
        return place, stop

    def num_held(self, text: str) -> int:
        """Characters at the end of ``text`` that may be the beginning of a match."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self.stops):
                return length
        return 0
