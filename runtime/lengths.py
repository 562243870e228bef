"""How many tokens to draft for each sequence: as many as pay, by acceptance and measured cost.

Here: `Lengths`, which keeps both. Not here: drafting (``drafters``), clocks (``speculator``), what
steps cost (``step_costs``).

A draft of k tokens that are each right with probability a brings a + a**2 + ... + a**k tokens
more than a plain step. It costs k rounds of the drafter, and what drafts add to the step. The depth
is chosen that brings most tokens a second over all sequences; a single one goes as deep as a token
of its own is worth its time. That is a forecast; what steps for which something was drafted made of
their time is kept as well, and where it is less than plain steps make, or no depth should pay,
nothing is drafted but a short try now and then, ever more seldom.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

from fxlm.runtime.sequence import Sequence
from fxlm.runtime.step_costs import StepCosts

DECAY = 0.95  # of what was seen of a sequence, per verification
PRIOR_TRIALS = 1.0  # the weight of what is seen of all sequences
FIRST_GUESS = 0.7  # acceptance of a token, before anything is seen
FIRST_PROFIT = 0.5  # plain steps gained by a step, before that is seen
PROFIT_DECAY = 0.9  # of the profit, per step that was drafted for
PATIENCE = 8  # steps without a draft before the first try
MOST_PATIENCE = 256
PROBE = 2  # tokens of a try
WINDOW = 64  # rounds of the drafter remembered
PLAIN_EVERY = 50  # a step without drafts now and then, to know what it costs


@dataclass(slots=True)
class _Record:
    """What was seen of one sequence: decayed counts, and how long nothing was drafted for it."""

    hits: float = 0.0
    misses: float = 0.0
    idle: int = 0
    patience: int = PATIENCE


class Lengths:
    """Chooses lengths.

    Args:
        most: tokens of a draft.
        adaptive: False drafts ``most`` always.
    """

    def __init__(self, most: int, *, adaptive: bool = True) -> None:
        self.most = most
        self.adaptive = adaptive
        self.costs = StepCosts()
        self._records: dict[Sequence, _Record] = {}
        self._all = _Record()
        self._profit = FIRST_PROFIT
        self._paid = True  # whether drafting paid when that was last looked at
        self._rounds: deque[float] = deque(maxlen=WINDOW)
        self._round_s = 0.0
        self._since_plain = 0

    # --- what is seen

    def note_draft(self, depth: int, seconds: float) -> None:
        """A drafter that was up to date took ``seconds`` for drafts of up to ``depth`` tokens."""
        self._rounds.append(seconds / max(depth, 1))
        self._round_s = median(self._rounds)

    def note_step(self, count: int, drafted: int, seconds: float) -> None:
        """A step of ``count`` decodes and ``drafted`` tokens took ``seconds``, the host's share
        included and the drafter's not."""
        self.costs.note(count, drafted, seconds)

    def note_outcome(self, count: int, made: int, seconds: float) -> None:
        """A step of ``count`` decodes that a drafter was asked for ``made`` tokens in ``seconds``,
        the drafter's share included."""
        plain = self.costs.plain(count)
        if plain > 0.0:
            gained = max(made / count - seconds / plain, -1.0)  # one that was held up counts once
            self._profit = PROFIT_DECAY * self._profit + (1.0 - PROFIT_DECAY) * gained

    def note_verified(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        """The first ``num_accepted`` of the tokens drafted for a sequence were right."""
        missed = num_accepted < num_drafted
        for record in (self._record(sequence), self._all):
            record.hits = DECAY * record.hits + num_accepted
            record.misses = DECAY * record.misses + missed

    def finish(self, sequence: Sequence) -> None:
        """A sequence ended."""
        self._records.pop(sequence, None)

    def acceptance(self, sequence: Sequence) -> float:
        """Probability that a token drafted for it is right, if those before it were."""
        everyone = self._all
        seen = everyone.hits + everyone.misses
        prior = (everyone.hits + FIRST_GUESS) / (seen + 1.0)
        own = self._record(sequence)
        return (own.hits + PRIOR_TRIALS * prior) / (own.hits + own.misses + PRIOR_TRIALS)

    def _record(self, sequence: Sequence) -> _Record:
        return self._records.setdefault(sequence, _Record())

    # --- what follows

    def rests(self) -> bool:
        """Whether nothing is drafted for anyone in the next step, without a look at the sequences.

        To be asked once a step; if False, `choose` is.
        """
        if not self.adaptive:
            return False
        if not self.costs.ready:  # nothing to compare with yet
            return True
        self._since_plain += 1
        if self._since_plain >= PLAIN_EVERY:
            self._since_plain = 0
            return True
        return not _is_due(self._all, self._paid)

    def choose(self, sequences: list[Sequence]) -> list[int]:
        """Tokens to draft for each; 0: none."""
        if not self.adaptive:
            return [self.most] * len(sequences)
        lengths = self._best([self.acceptance(sequence) for sequence in sequences])
        self._paid = any(lengths) and self._profit > 0.0
        if not self._paid:  # this is a try of all
            return lengths if any(lengths) else [min(PROBE, self.most)] * len(sequences)
        for place, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
            if _is_due(self._record(sequence), length > 0) and not length:
                lengths[place] = min(PROBE, self.most)
        return lengths

    def _best(self, acceptances: list[float]) -> list[int]:
        count = len(acceptances)
        plain_s = self.costs.plain(count)
        setup, slope = self.costs.extra
        best = count / plain_s  # tokens a second
        lengths = [0] * count
        caps = [self._cap(a, best * slope) for a in acceptances]
        gains, chances = [0.0] * count, [1.0] * count
        for depth in range(1, max(caps, default=0) + 1):
            for place, cap in enumerate(caps):
                if depth <= cap:
                    chances[place] *= acceptances[place]
                    gains[place] += chances[place]
            drafted = sum(min(depth, cap) for cap in caps)
            seconds = plain_s + setup + slope * drafted + self._round_s * depth
            if (count + sum(gains)) / seconds > best:
                best = (count + sum(gains)) / seconds
                lengths = [min(depth, cap) for cap in caps]
        return lengths

    def _cap(self, acceptance: float, price: float) -> int:
        """Deepest token that is worth ``price``, in tokens."""
        depth, chance = 0, acceptance
        while depth < self.most and chance > price:
            depth += 1
            chance *= acceptance
        return depth


def _is_due(record: _Record, paid: bool) -> bool:
    """Whether to draft: it paid, or it was left out for long enough to try again."""
    if paid:
        record.idle, record.patience = 0, PATIENCE
        return True
    record.idle += 1
    if record.idle < record.patience:
        return False
    if record.idle == record.patience:  # a try is two steps: in the first a draft model catches up
        return True
    record.idle = 0
    record.patience = min(2 * record.patience, MOST_PATIENCE)
    return True
