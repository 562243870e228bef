"""compare: errors of log-probabilities, and that nothing hides."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fxlm.runtime.explain.compare import chosen_rows, compare, from_logits, from_samples

ROWS = [(0, 0), (0, 1)]
LOGITS = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))


def sampled(logits: torch.Tensor, count: int = 20) -> list[torch.Tensor]:
    top, ids = logits.log_softmax(-1).topk(count)
    first = torch.cat([top[:, :1], top], 1), torch.cat([ids[:, :1], ids], 1)
    return [ids[:, 0], *first, torch.ones(len(logits))]


def test_the_same_is_equal() -> None:
    found = compare(from_samples(ROWS, sampled(LOGITS), 50), from_logits(ROWS, LOGITS))
    assert (found.absolute, found.relative, found.agreement) == (0.0, 0.0, 1.0)


def test_an_error_is_found_where_it_is() -> None:
    wrong = LOGITS.clone()
    wrong[1, int(LOGITS[1].argmax())] -= 20.0
    found = compare(from_logits(ROWS, wrong), from_logits(ROWS, LOGITS))
    assert found.worst == (0, 1)
    assert 15.0 < found.absolute < 21.0
    assert found.agreement == 0.5


def test_a_typical_error_is_a_root_mean_square() -> None:
    apart = from_logits(ROWS, LOGITS)
    moved = apart.logprobs.clone()
    moved[0] += 0.3  # the row, not its softmax
    found = compare(dataclasses.replace(apart, logprobs=moved), apart)
    assert found.typical == pytest.approx(0.3 / 2**0.5)


def test_rows_are_chosen_by_place() -> None:
    scores = from_logits(ROWS, LOGITS)
    assert torch.equal(chosen_rows(scores, [ROWS[1]]).logprobs[0], scores.logprobs[1])


def test_a_nan_is_an_infinite_error() -> None:
    wrong = LOGITS.clone()
    wrong[0, 3] = float("nan")
    assert compare(from_logits(ROWS, wrong), from_logits(ROWS, LOGITS)).absolute == float("inf")


def test_a_row_without_any_probability_is_an_infinite_error() -> None:
    outputs = sampled(LOGITS)
    outputs[1][0] = -torch.inf  # logprobs of the first row
    found = compare(from_samples(ROWS, outputs, 50), from_logits(ROWS, LOGITS))
    assert (found.absolute, found.worst) == (float("inf"), (0, 0))


def test_ids_that_only_one_side_ranks_first_count() -> None:
    wrong = from_samples(ROWS, sampled(-LOGITS), 50)
    found = compare(wrong, from_logits(ROWS, LOGITS))
    assert found.absolute > 1.0
    assert found.agreement == 0.0


def test_a_token_of_no_probability_is_no_error() -> None:
    masked = LOGITS.clone()
    masked[:, 7] = float("-inf")
    assert compare(from_logits(ROWS, masked), from_logits(ROWS, masked)).absolute == 0.0
