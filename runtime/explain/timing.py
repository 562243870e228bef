"""Milliseconds of a step with and without a pass, measured in turns on the same inputs.

Where a pass cannot be left out, the stages before and after it are timed instead, by prefill.
Not here: compiling (`fxlm.runtime.compile`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from fxlm.compiler.cost import Shape
from fxlm.runtime.explain import fixtures
from fxlm.runtime.explain.subjects import Subject, new_caches
from fxlm.runtime.probe import Clock

MIN_ROUNDS, MAX_ROUNDS = 5, 40
BUDGET_S = 0.5  # of one comparison
LIMIT_S = 5.0  # beyond this, two rounds are enough


def step_call(
    subject: Subject, shape: Shape, vocab_size: int, block_size: int
) -> Callable[[], object]:
    """A step of this shape, ready to be called again and again; its cache holds zeros."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (shape.num_seqs, shape.context), generator=generator)
    prompts: list[list[int]] = ids.tolist()
    start = shape.context - shape.num_new if subject.paged else 0
    chunks = [
        fixtures.Chunk(prompt=i, start=start, count=shape.context - start)
        for i in range(shape.num_seqs)
    ]
    inputs = fixtures.step_inputs(prompts, chunks, block_size, subject.steer_size)
    caches = new_caches(subject.cache_specs, fixtures.num_blocks(prompts, block_size), block_size)
    inputs["sample_ints"][:, 3] = -1  # no log-probabilities: a token is drawn, as in serving
    inputs["sample_ints"][:, 4] = -1
    bound = subject.bind(caches)
    return lambda: bound(inputs)


def in_turns(
    calls: Mapping[str, Callable[[], object]], clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Median milliseconds of each call, called in turns so that the machine's mood is shared.

    With ``time.process_time`` as the clock and one thread, what others take of the cores is left
    out.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # warm
    start = clock()
    rounds = 0
    while _goes_on(rounds, clock() - start):
        for name, call in calls.items():
            started = clock()
            call()
            times[name].append((clock() - started) * 1e3)
        rounds += 1
    return {name: statistics.median(found) for name, found in times.items()}


def _goes_on(rounds: int, seconds: float) -> bool:
    if seconds > LIMIT_S:
        return rounds < 2
    return rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and seconds < BUDGET_S)
