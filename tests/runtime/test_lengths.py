"""How long drafts get, under costs that a test sets."""

from collections.abc import Callable

import pytest

from fxlm.runtime.lengths import MOST_PATIENCE, PROBE, TRY_SHARE, Lengths
from fxlm.runtime.request import Request
from fxlm.runtime.sequence import Sequence


def sequences(count: int) -> list[Sequence]:
    return [
        Sequence(Request(request_id=str(i), prompt_token_ids=[1]), order=i, seed=0, max_model_len=9)
        for i in range(count)
    ]


def simulate(
    lengths: Lengths,
    given: list[Sequence],
    accepts: Callable[[int, int], int],
    *,
    steps: int = 300,
    base: float = 1.0,
    slope: float = 0.02,
    setup: float = 0.0,
    round_s: float = 0.0,
    look_s: float = 0.0,
) -> list[list[int]]:
    """Run steps of these costs; ``accepts(i, k)`` of k tokens of sequence i are right.

    ``setup``: what drafts add to a step however many they are. ``look_s``: what asking the drafter
    takes beside its rounds.
    """
    history = []
    for _ in range(steps):
        asked = not lengths.rests(len(given))
        chosen = lengths.choose(given) if asked else [0] * len(given)
        history.append(chosen)
        if max(chosen):
            lengths.note_draft(max(chosen), round_s * max(chosen))
        made = len(given)
        for index, (sequence, length) in enumerate(zip(given, chosen, strict=True)):
            if length:
                made += accepts(index, length)
                lengths.note_verified(sequence, length, accepts(index, length))
        seconds = base + slope * (len(given) + sum(chosen)) + (setup if sum(chosen) else 0.0)
        lengths.note_step(len(given), sum(chosen), seconds)
        if asked:
            lengths.note_outcome(len(given), made, seconds + round_s * max(chosen) + look_s)
    return history


def test_cheap_and_right_drafts_get_long() -> None:
    history = simulate(Lengths(5), sequences(1), lambda i, k: k)
    assert history[0] == [0]  # a plain step first, to know its cost
    assert all(k == [5] for k in history[20:] if k != [0])
    assert sum(k == [0] for k in history) < 15


def test_wrong_drafts_stop_but_for_tries_that_cost_a_hundredth() -> None:
    history = simulate(Lengths(5), sequences(1), lambda i, k: 0, slope=0.25, steps=6000)
    tries = [step for step, chosen in enumerate(history) if chosen[0] and step > 200]
    assert {history[step][0] for step in tries} == {PROBE}
    assert tries[-1] - tries[-2] == 1  # a try is two steps
    lost = 2 * PROBE * 0.25 / 1.25  # plain steps, by a try
    assert tries[-1] - tries[-3] == pytest.approx(lost / TRY_SHARE, rel=0.1)


def test_dear_tries_are_seldom_and_cheap_ones_are_not() -> None:
    def distance(look_s: float) -> int:
        history = simulate(Lengths(5), sequences(1), lambda i, k: 0, look_s=look_s, steps=4000)
        tries = [step for step, chosen in enumerate(history) if chosen[0]]
        return tries[-1] - tries[-3]

    assert distance(0.01) < 20 < distance(1.0) < distance(10.0) <= MOST_PATIENCE + 20


def test_drafting_comes_back_when_it_pays_again() -> None:
    lengths, given = Lengths(4), sequences(1)
    simulate(lengths, given, lambda i, k: 0, steps=200)
    history = simulate(lengths, given, lambda i, k: k, steps=600)
    assert history[-1][0] == 4 or history[-2][0] == 4


def test_a_slow_drafter_is_given_up() -> None:
    history = simulate(Lengths(5), sequences(1), lambda i, k: k, round_s=2.0)
    assert sum(chosen[0] for chosen in history[100:]) < 20


def test_full_steps_leave_no_room_for_drafts() -> None:
    """Where every token costs its time, a draft must be nearly certain."""
    history = simulate(
        Lengths(5), sequences(4), lambda i, k: k // 2, steps=600, base=0.01, slope=1.0
    )
    late = [sum(chosen) for chosen in history[200:]]
    assert sum(late) / len(late) < 1.0


def test_each_sequence_has_its_own_length() -> None:
    history = simulate(Lengths(6), sequences(3), lambda i, k: [0, 1, k][i], slope=0.08)
    settled = [chosen for chosen in history[150:] if max(chosen)]
    mean = [sum(column) / len(settled) for column in zip(*settled, strict=True)]
    assert mean[0] < 0.5 < mean[1] < 4 < mean[2]


def test_fixed_lengths_never_change() -> None:
    history = simulate(Lengths(3, adaptive=False), sequences(2), lambda i, k: 0, steps=20)
    assert history == [[3, 3]] * 20


def test_one_token_is_enough_where_the_host_takes_most_of_a_draft() -> None:
    """What comes with any draft is no reason for a short one."""
    history = simulate(Lengths(4), sequences(1), lambda i, k: k, slope=0.01, setup=0.5, steps=400)
    assert all(k == [4] for k in history[100:] if k != [0])


def test_what_the_forecast_does_not_know_ends_drafting_all_the_same() -> None:
    history = simulate(Lengths(3), sequences(1), lambda i, k: k // 3, look_s=1.2, steps=2000)
    late = [chosen[0] > 0 for chosen in history[300:]]
    assert sum(late) / len(late) < 0.05


def test_a_slower_machine_does_not_end_drafting_that_pays() -> None:
    lengths, given = Lengths(4), sequences(2)
    simulate(lengths, given, lambda i, k: k // 2)
    history = simulate(lengths, given, lambda i, k: k // 2, base=5.0, slope=0.1)
    assert sum(max(chosen) > 0 for chosen in history[150:]) > 100


def test_what_ended_is_forgotten() -> None:
    lengths, given = Lengths(4), sequences(2)
    simulate(lengths, given, lambda i, k: k, steps=5)
    for sequence in given:
        lengths.finish(sequence)
    assert not lengths._records
