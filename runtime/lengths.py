"""How many tokens to draft for each sequence: as many as pay, by acceptance and measured cost.

Here: `Lengths`, which keeps both. Not here: drafting (``drafters``), clocks (``speculator``), what
steps cost (``step_costs``).

A draft of k tokens that are each right with probability a brings a + a**2 + ... + a**k tokens
more than a plain step. It costs k rounds of the drafter, and what drafts add to the step. The depth
is chosen that brings most tokens a second over all sequences; a single one goes as deep as a token
of its own is worth its time. That is a forecast; what steps for which something was drafted made of
their time is kept as well, and where it is less than plain steps make, or no depth should pay,
nothing is drafted but a short try now and then, as often as tries take a hundredth of the time.
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
FIRST_PROFIT = 0.3  # plain steps gained by a step, before that is seen, and at most after a try
PROFIT_DECAY = 0.98  # of the profit, per step that was drafted for: gains come in bursts
TRY_DECAY = 0.5  # in a try, which is short
MOST_LOSS = -4.0  # plain steps, of a step that may have been held up
PATIENCE = 8  # steps without a draft before the first try
MOST_PATIENCE = 512
PROBE = 2  # tokens of a try
TRY_STEPS = 2  # in the first a draft model catches up
TRY_SHARE = 0.01  # of the time may be lost by tries
WINDOW = 64  # rounds of the drafter remembered
HOLD = 4  # steps that lengths are kept for, while the sequences are the same
PLAIN_EVERY = 50  # a step without drafts now and then, to know what it costs
PLAIN_SOON = 5  # as long as it is hardly known
FEW_PLAIN = 4  # such steps


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
        self._idle = 0  # steps since it did, or since the last try
        self._patience = PATIENCE
        self._tried = 0  # steps of the try under way
        self._lost = 0.0  # plain steps that it took in vain
        self._rounds: deque[float] = deque(maxlen=WINDOW)
        self._round_s = 0.0
        self._since_plain = 0
        self._chosen: tuple[list[Sequence], list[int]] = [], []
        self._held = 0  # steps since these were chosen

    # --- what is seen

    def note_draft(self, depth: int, seconds: float) -> None:
        """A drafter that was up to date took ``seconds`` for drafts of up to ``depth`` tokens."""
        self._rounds.append(seconds / max(depth, 1))
        self._round_s = median(self._rounds)

    def note_step(self, count: int, drafted: int, seconds: float) -> None:
        """A step of ``count`` decodes and ``drafted`` tokens took ``seconds``, the host's share
        included and the drafter's not."""
        self.costs.note(count, drafted, seconds)
        if not drafted:
            self._since_plain = 0

    def note_outcome(self, count: int, made: int, seconds: float, *, followed: bool = True) -> None:
        """A step of ``count`` decodes that a drafter was asked for ``made`` tokens in ``seconds``,
        the drafter's share included.

        It caught up with no text if it ``followed``; a try is not judged by that, but drafting is.
        """
        plain = self.costs.plain(count)
        if plain <= 0.0:
            return
        gained = max(made / count - seconds / plain, MOST_LOSS)
        self._lost -= gained
        if followed or self._paid:
            decay = PROFIT_DECAY if self._paid else TRY_DECAY
            self._profit = decay * self._profit + (1.0 - decay) * gained
            if not self._paid:
                self._profit = min(self._profit, FIRST_PROFIT)

    def note_verified(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        """The first ``num_accepted`` of the tokens drafted for a sequence were right."""
        missed = num_accepted < num_drafted
        for record in (self._record(sequence), self._all):
            record.hits = DECAY * record.hits + num_accepted
            record.misses = DECAY * record.misses + missed

    def finish(self, sequence: Sequence) -> None:
        """A sequence ended."""
        self._records.pop(sequence, None)
        self._chosen = [], []

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

    def rests(self, count: int) -> bool:
        """Whether nothing is drafted in the next step, of ``count`` sequences, whoever they are.

        To be asked once a step; if False, `choose` is.
        """
        if not self.adaptive:
            return False
        if not self.costs.ready:  # nothing to compare with yet
            return True
        self._since_plain += 1
        few = self.costs.num_plain(count) < FEW_PLAIN
        if self._since_plain >= (PLAIN_SOON if few else PLAIN_EVERY):
            return True  # until there is one: steps with prompts in them tell nothing
        if self._paid:
            return False
        if self._tried >= TRY_STEPS:
            most = min(max(self._lost / TRY_SHARE, PATIENCE), MOST_PATIENCE)
            self._idle, self._patience, self._tried = 0, int(most), 0
        self._idle += 1
        return self._idle < self._patience

    def choose(self, sequences: list[Sequence]) -> list[int]:
        """Tokens to draft for each; 0: none."""
        if not self.adaptive:
            return [self.most] * len(sequences)
        self._held += 1
        if self._held >= HOLD or self._chosen[0] != sequences:
            best = self._best([self.acceptance(sequence) for sequence in sequences])
            self._chosen, self._held = (sequences, best), 0
        lengths = self._chosen[1].copy()
        paid, self._paid = self._paid, any(lengths) and self._profit > 0.0
        if paid and not self._paid:  # what plain steps cost is looked at before the first try
            self._idle, self._patience, self._tried = 0, PATIENCE, 0
            return [0] * len(sequences)
        if not self._paid:  # this is a try of all
            if not self._tried:
                self._lost = 0.0
                self.costs.look()
            self._tried += 1
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
