"""What steps cost, from what was measured."""

import pytest

from fxlm.runtime.step_costs import FIRST_SLOPE, StepCosts


def test_nothing_is_known_before_a_plain_step() -> None:
    costs = StepCosts()
    costs.note(1, 3, 1.0)
    assert not costs.ready
    costs.note(1, 0, 1.0)
    assert costs.ready


def test_plain_steps_are_a_line_through_their_medians() -> None:
    costs = StepCosts()
    for count in (1, 5, 3, 5):
        costs.note(count, 0, 0.5 + 0.1 * count)
    assert costs.plain(4) == pytest.approx(0.9)
    costs.note(1, 0, 60.0)  # one that was held up is not counted
    costs.note(1, 0, 0.6)
    assert costs.plain(1) == pytest.approx(0.6)
    assert costs.plain(4) == pytest.approx(0.9)


def test_drafts_cost_something_at_once_and_something_a_token() -> None:
    costs = StepCosts()
    costs.note(2, 0, 1.0)
    for drafted in (2, 6, 4, 6):
        costs.note(2, drafted, 1.0 + 0.3 + 0.05 * drafted)
    assert costs.extra == pytest.approx((0.3, 0.05))


def test_one_size_of_drafts_is_not_taken_apart() -> None:
    costs = StepCosts()
    costs.note(1, 0, 1.0)
    assert costs.extra == pytest.approx((0.0, FIRST_SLOPE * 1.0))
    costs.note(1, 4, 1.8)
    assert costs.extra == pytest.approx((0.0, 0.2))


def test_costs_are_of_late() -> None:
    costs = StepCosts()
    for seconds in [1.0] * 40 + [2.0] * 40:
        costs.note(1, 0, seconds)
    assert costs.plain(1) == pytest.approx(2.0)
