"""How many tokens to draft for each sequence: as many as pay, by acceptance and measured cost.

Here: `Lengths`, which keeps both. Not here: drafting (``drafters``), clocks (``speculator``).

A draft of k tokens that are each right with probability a brings a + a**2 + ... + a**k tokens
more than a plain step. It costs k rounds of the drafter, and k tokens more in the step, whose
time is taken as ``base + slope * tokens``. The depth is chosen that brings most tokens a second
over all sequences; a single one goes as deep as a token of its own is worth its time. Where
nothing pays, nothing is drafted but a short try now and then, ever more seldom.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

from fxlm.runtime.sequence import Sequence

DECAY = 0.95  # of what was seen of a sequence, per verification
PRIOR_TRIALS = 1.0  # the weight of what is seen of all sequences
FIRST_GUESS = 0.7  # acceptance of a token, before anything is seen
FIRST_SLOPE = 0.05  # a token more costs this share of a plain step, before that is seen
PATIENCE = 8  # steps without a draft before the first try
MOST_PATIENCE = 512
PROBE = 2  # tokens of a try
WINDOW = 64  # steps and drafts remembered
REFRESH = 16  # steps between looks at what they cost
PLAIN_EVERY = 50  # a step without drafts now and then, if sizes of steps never differ otherwise


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
        self._records: dict[Sequence, _Record] = {}
        self._all = _Record()
        self._steps: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._rounds: deque[float] = deque(maxlen=WINDOW)
        self._since_plain = 0
        self._age = REFRESH  # steps since the costs were looked at
        self._costs = 0.0, 0.0, 0.0

    # --- what is seen

    def note_draft(self, depth: int, seconds: float) -> None:
        """A drafter that was up to date took ``seconds`` for drafts of up to ``depth`` tokens."""
        self._rounds.append(seconds / max(depth, 1))

    def note_step(self, num_tokens: int, seconds: float) -> None:
        """A step of decodes, drafts included, took ``seconds``."""
        self._steps.append((num_tokens, seconds))
        self._age += 1

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

    def choose(self, sequences: list[Sequence]) -> list[int]:
        """Tokens to draft for each; 0: none."""
        if not self.adaptive:
            return [self.most] * len(sequences)
        if not self._steps:  # nothing to compare with yet
            return [0] * len(sequences)
        if self._is_plain_due():
            return [0] * len(sequences)
        lengths = self._best([self.acceptance(sequence) for sequence in sequences])
        paid = any(lengths)
        if not _is_due(self._all, paid):  # it pays for nobody: a try of all, if at all
            return lengths
        if not paid:
            return [min(PROBE, self.most)] * len(sequences)
        for place, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
            if _is_due(self._record(sequence), length > 0) and not length:
                lengths[place] = min(PROBE, self.most)
        return lengths

    def _is_plain_due(self) -> bool:
        """Whether the cost of a token cannot be told, as all steps were of one size."""
        self._since_plain += 1
        due = self._since_plain >= PLAIN_EVERY
        if due:
            self._since_plain = 0
        return due and len({size for size, _ in self._steps}) == 1

    def _best(self, acceptances: list[float]) -> list[int]:
        base, slope, round_s = self._recent_costs()
        count = len(acceptances)
        plain = count / (base + slope * count)  # tokens a second
        caps = [self._cap(a, plain * slope) for a in acceptances]
        best, lengths = plain, [0] * count
        for depth in range(1, max(caps, default=0) + 1):
            chosen = [min(depth, cap) for cap in caps]
            gained = sum(_gain(a, k) for a, k in zip(acceptances, chosen, strict=True))
            seconds = base + slope * (count + sum(chosen)) + round_s * depth
            if (count + gained) / seconds > best:
                best, lengths = (count + gained) / seconds, chosen
        return lengths

    def _cap(self, acceptance: float, price: float) -> int:
        """Deepest token that is worth ``price``, in tokens."""
        depth, chance = 0, acceptance
        while depth < self.most and chance > price:
            depth += 1
            chance *= acceptance
        return depth

    def _recent_costs(self) -> tuple[float, float, float]:
        """Seconds: base and slope of a step, and a round of the drafter; not always the latest."""
        if self._age >= REFRESH or len(self._steps) < REFRESH:
            self._age = 0
            self._costs = *self.costs(), median(self._rounds) if self._rounds else 0.0
        return self._costs

    def costs(self) -> tuple[float, float]:
        """Seconds of a step: (base, slope); the line through medians of the sizes seen."""
        by_size: dict[int, list[float]] = {}
        for size, seconds in self._steps:
            by_size.setdefault(size, []).append(seconds)
        points = [(size, median(seen), len(seen)) for size, seen in by_size.items()]
        total = sum(weight for _, _, weight in points)
        x = sum(size * weight for size, _, weight in points) / total
        y = sum(seconds * weight for _, seconds, weight in points) / total
        if len(points) == 1:
            base = y / (1.0 + FIRST_SLOPE * x)
            return base, FIRST_SLOPE * base
        spread = sum(weight * (size - x) ** 2 for size, _, weight in points)
        joint = sum(weight * (size - x) * (seconds - y) for size, seconds, weight in points)
        slope = min(max(joint / spread, 0.0), y / x)  # neither part can be negative
        return y - slope * x, slope


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


def _gain(acceptance: float, length: int) -> float:
    """Expected tokens that a draft adds."""
    gained, chance = 0.0, 1.0
    for _ in range(length):
        chance *= acceptance
        gained += chance
    return gained
