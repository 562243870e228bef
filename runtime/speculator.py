"""Between engine and drafter: for whom is drafted, how much, and what becomes of a bad drafter.

Here: `Speculator`. Not here: guessing (``drafters``), lengths that pay (``lengths``), blocks and
budget for drafts (``scheduler``), verification (the graph).
"""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

from fxlm.runtime.drafters.base import Drafter
from fxlm.runtime.lengths import Lengths
from fxlm.runtime.scheduler import Plan, Scheduler
from fxlm.runtime.sequence import Sequence

_log = logging.getLogger(__name__)

Clock = Callable[[], float]


class Speculator:
    """Fills the ``drafts`` of sequences before a step is planned.

    A drafter that raises or returns nonsense is switched off with a warning; the requests go on
    without drafts and lose nothing but speed.

    Args:
        drafter: guesses.
        lengths: how many tokens to ask for.
        clock: seconds that only grow.
    """

    def __init__(
        self, drafter: Drafter, lengths: Lengths, clock: Clock = time.perf_counter
    ) -> None:
        self.drafter: Drafter | None = drafter
        self.lengths = lengths
        self._clock = clock
        self._started = 0.0
        self._drafting_s = 0.0  # of the step under way: seconds until it was planned, if any
        self._num_accepted = 0
        self._was_followed = False  # nobody had to catch up in it
        self._followed: set[Sequence] = set()  # who was drafted for in the last step

    def draft(self, scheduler: Scheduler) -> None:
        """Give every running sequence that is about to draw its drafts; others get none.

        A step begins here, and `stop` ends it.
        """
        self._started = self._clock()
        self._drafting_s, self._num_accepted = 0.0, 0
        for sequence in scheduler.running:
            if sequence.drafts:
                sequence.drafts = []
        count = len(scheduler.running)
        if self.drafter is None or not count or self.lengths.rests(count):
            self._followed = set()
            return
        ready = [
            sequence
            for sequence in scheduler.running
            if len(sequence.token_ids) == sequence.num_computed + 1 and not sequence.num_forks
        ]
        if not ready:
            return
        share, more = divmod(scheduler.draft_budget, len(ready))
        limits = [
            min(length, share + (place < more), sequence.max_total - len(sequence.token_ids) - 1)
            for place, (sequence, length) in enumerate(
                zip(ready, self.lengths.choose(ready), strict=True)
            )
        ]
        asked = [(s, limit) for s, limit in zip(ready, limits, strict=True) if limit > 0]
        self._was_followed = bool(asked) and all(s in self._followed for s, _ in asked)
        if asked:
            self._propose(asked, scheduler.spec.vocab_size)
        self._followed = {s for s, _ in asked}
        self._drafting_s = self._clock() - self._started

    def _propose(self, asked: list[tuple[Sequence, int]], vocab_size: int) -> None:
        assert self.drafter is not None
        started = self._clock()
        try:
            found = self.drafter.propose([s for s, _ in asked], [limit for _, limit in asked])
            drafts = _checked(found, asked, vocab_size)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a drafter, a user's perhaps, raises
            self._switch_off(error)
            return
        depth = max(map(len, drafts))
        if depth and self._was_followed:
            self.lengths.note_draft(depth, self._clock() - started)
        for (sequence, _), tokens in zip(asked, drafts, strict=True):
            sequence.drafts = tokens

    def _switch_off(self, error: BaseException) -> None:
        assert self.drafter is not None
        name = self.drafter.name or type(self.drafter).__name__
        self.drafter = None
        _log.warning(
            "%s failed; nothing is drafted any more and requests go on without: %s: %s",
            name, type(error).__name__, error, exc_info=error,
        )  # fmt: skip

    # --- what came of it

    def note(self, sequence: Sequence, num_accepted: int) -> None:
        """``num_accepted`` of the sequence's drafts were right."""
        self._num_accepted += num_accepted
        self.lengths.note_verified(sequence, len(sequence.drafts), num_accepted)

    def stop(self, plan: Plan) -> None:
        """A step ended; all of its drafts were noted."""
        count = len(plan.decodes)
        if plan.chunks or not count:
            return
        seconds = self._clock() - self._started
        self.lengths.note_step(count, plan.num_tokens - count, seconds - self._drafting_s)
        if self._drafting_s:
            made = count + self._num_accepted
            self.lengths.note_outcome(count, made, seconds, followed=self._was_followed)

    def finish(self, sequence: Sequence) -> None:
        """A sequence ended."""
        self.lengths.finish(sequence)
        try:
            if self.drafter is not None:
                self.drafter.finish(sequence)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # as above
            self._switch_off(error)


def _checked(
    found: list[list[int]], asked: list[tuple[Sequence, int]], vocab_size: int
) -> list[list[int]]:
    """Drafts as plain numbers, cut to what was asked for and before a token that ends it all.

    The last token needs no draft: the row before draws it anyway.
    """
    if len(found) != len(asked):
        raise ValueError(f"it was asked for {len(asked)} drafts and gave {len(found)}")
    drafts = []
    for (sequence, limit), tokens in zip(asked, found, strict=True):
        draft: list[int] = []
        for token in islice(tokens, limit):  # which may never end
            number = _token_id(token)
            if not 0 <= number < vocab_size:
                raise ValueError(f"token {token} is outside the vocabulary, 0..{vocab_size - 1}")
            if number in sequence.stop_ids:
                break
            draft.append(number)
        drafts.append(draft)
    return drafts


def _token_id(token: Any) -> int:
    """A whole number of Python, numpy or torch; no text and no float, which would be cut."""
    try:
        return operator.index(token)
    except TypeError:
        raise TypeError(f"token {token!r} is no whole number") from None
