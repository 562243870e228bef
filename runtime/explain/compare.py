"""Log-probabilities of a run, and how far those of another run are from them.

Errors are in nats of log-probability, over the ids that either side ranks among its first 20
and the prompt's own next token: those decide what is drawn. A relative error is that of a row
as a share of the row's largest log-probability in magnitude. Not here: running (`subjects`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fxlm.runtime.explain.fixtures import NUM_LOGPROBS, Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Log-probabilities of the next token for rows of prompts.

    Attributes:
        rows: (prompt, position) of each.
        logprobs: float32 [N, V]; counts only where ``known``.
        known: bool [N, V]; all of a row of logits, some twenty ids of a sampled row.
        best: int64 [N], the most likely id.
    """

    rows: list[Row]
    logprobs: torch.Tensor
    known: torch.Tensor
    best: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """How far one run is from another.

    Attributes:
        absolute: largest error of a log-probability, in nats; infinite where one is NaN, or
            where a row has none at all.
        typical: root mean square over all those ids of all rows, in nats.
        relative: largest error of a row, as a share of its largest log-probability.
        agreement: share of rows whose most likely id is the same.
        num_rows: rows compared.
        worst: (prompt, position) of the largest error.
    """

    absolute: float
    typical: float
    relative: float
    agreement: float
    num_rows: int
    worst: Row

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "worst": list(self.worst)}

    def text(self) -> str:
        """On one line."""
        return f"{self.absolute:.2e} nats, {self.relative:.2e} relative, top-1 {self.agreement:.1%}"


def from_logits(rows: list[Row], logits: torch.Tensor) -> Scores:
    """Scores of logits [1, N, V] or [N, V]."""
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return Scores(
        rows=rows,
        logprobs=flat.log_softmax(-1),
        known=torch.ones_like(flat, dtype=torch.bool),
        best=flat.argmax(-1),
    )


def from_samples(rows: list[Row], outputs: Sequence[torch.Tensor], vocab_size: int) -> Scores:
    """Scores of a sampled step: ids [N], logprobs [N, L + 1], logprob_ids [N, L + 1], ranks."""
    _, logprobs, ids, _, *_taps = outputs
    used = (ids >= 0) & (ids < vocab_size) & (logprobs > float("-inf")) | logprobs.isnan()
    place = torch.where(used, ids, vocab_size).clamp(0, vocab_size)  # the last column is cut off
    full = torch.zeros(len(rows), vocab_size + 1).scatter(1, place, logprobs.float())
    known = torch.zeros(len(rows), vocab_size + 1, dtype=torch.bool).scatter(1, place, used)
    return Scores(
        rows=rows, logprobs=full[:, :-1], known=known[:, :-1], best=ids[:, 1]
    )  # fmt: skip


def joined(parts: Sequence[Scores]) -> Scores:
    """Scores of several steps as one."""
    return Scores(
        rows=[row for part in parts for row in part.rows],
        logprobs=torch.cat([part.logprobs for part in parts]),
        known=torch.cat([part.known for part in parts]),
        best=torch.cat([part.best for part in parts]),
    )


def chosen_rows(scores: Scores, rows: Sequence[Row]) -> Scores:
    """Those rows of a run, which it must have."""
    place = {row: i for i, row in enumerate(scores.rows)}
    index = torch.tensor([place[row] for row in rows])
    return Scores(
        rows=list(rows), logprobs=scores.logprobs[index], known=scores.known[index],
        best=scores.best[index],
    )  # fmt: skip


def compare(found: Scores, reference: Scores) -> Errors:
    """Errors of ``found``, whose rows must all be in ``reference``."""
    reference = chosen_rows(reference, found.rows)
    exact, known = reference.logprobs, reference.known & found.known
    chosen = known & (_first(found.logprobs, found.known) | _first(exact, reference.known))
    silent = ~chosen.any(-1)  # a row of NaN, of which no id is drawn
    difference = torch.where(found.logprobs == exact, 0.0, (found.logprobs - exact).abs())
    difference = torch.where(chosen, difference.nan_to_num(nan=torch.inf, posinf=torch.inf), 0.0)
    worst = torch.where(silent, torch.inf, difference.amax(-1))
    size = torch.where(chosen, exact.abs(), 0.0).amax(-1).clamp(min=1e-6)
    return Errors(
        absolute=float(worst.max()),
        typical=float((difference.square().sum() / chosen.sum().clamp(min=1)).sqrt()),
        relative=float((worst / size).max()),
        agreement=float((found.best == reference.best).float().mean()),
        num_rows=len(found.rows),
        worst=found.rows[int(worst.argmax())],
    )


def _first(logprobs: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """The ids that a row ranks first; a NaN is never overlooked."""
    ranked = torch.where(known, logprobs, -torch.inf)
    count = min(NUM_LOGPROBS, ranked.shape[1])
    ids = ranked.nan_to_num(nan=torch.inf).topk(count, dim=-1).indices
    return torch.zeros_like(known).scatter(1, ids, True) & known
