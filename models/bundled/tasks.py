"""The synthetic chat tasks: what is trained on, what is held out, and scoring.

Every problem has a `key` that names the problem and not its wording; a hash
of the key decides whether it may be trained on (`is_held_out`), so the two
sets are disjoint whatever the seeds. Only the standard library is used: no
tokenizer, no tensors, no engine.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence

from fxlm.models.bundled import kinds
from fxlm.models.bundled.kinds import Task

HELD_OUT_ONE_IN = 16  # one problem in sixteen is never trained on

Message = dict[str, str]
Generator = Callable[[random.Random], Task]
Checker = Callable[[Task, str], bool]

GENERATORS: dict[str, Generator] = {
    "arithmetic": kinds.arithmetic,
    "reverse": kinds.reverse,
    "count": kinds.count,
    "repeat": kinds.repeat,
    "json": kinds.extract,
    "function": kinds.function,
    "chat": kinds.chat,
}
CHECKERS: dict[str, Checker] = {
    "arithmetic": kinds.check_arithmetic,
    "reverse": kinds.check_same_words,
    "count": kinds.check_number,
    "repeat": kinds.check_same_words,
    "json": kinds.check_json,
    "function": kinds.check_function_task,
    "chat": kinds.check_exact,
}
# Share of each kind in training: more where the answer is harder to compute.
WEIGHTS: dict[str, int] = {
    "arithmetic": 46,
    "reverse": 10,
    "count": 16,
    "repeat": 8,
    "json": 8,
    "function": 6,
    "chat": 6,
}
# At first, copying: until it is learned, nothing that stands on it can be.
COPYING_WEIGHTS: dict[str, int] = {
    "arithmetic": 12,
    "reverse": 15,
    "count": 6,
    "repeat": 35,
    "json": 25,
    "function": 5,
    "chat": 2,
}


def is_held_out(key: str) -> bool:
    """Whether the problem named `key` is reserved for evaluation."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def check(task: Task, output: str) -> bool:
    """Whether `output` answers `task`."""
    return CHECKERS[task.kind](task, output.strip())


def training_tasks(seed: int, shares: dict[str, int] = WEIGHTS) -> Iterator[Task]:
    """An endless stream of tasks, none of them held out."""
    rng = random.Random(seed)
    names, weights = list(shares), list(shares.values())
    while True:
        task = GENERATORS[rng.choices(names, weights)[0]](rng)
        if not is_held_out(task.key):
            yield task


def held_out_tasks(kind: str, number: int, seed: int = 20_000) -> list[Task]:
    """`number` distinct held-out tasks of one kind, always the same."""
    rng = random.Random(f"{kind}/{seed}")
    found: dict[str, Task] = {}
    for _ in range(number * HELD_OUT_ONE_IN * 50):
        task = GENERATORS[kind](rng)
        if is_held_out(task.key):
            found.setdefault(task.key, task)
        if len(found) == number:
            break
    return list(found.values())


def messages(task: Task) -> list[Message]:
    """The task as the one user message of a conversation."""
    return [{"role": "user", "content": task.prompt}]


def score_tasks(
    answer: Callable[[Sequence[list[Message]]], Sequence[str]], number: int
) -> dict[str, float]:
    """Share of `number` held-out problems a kind that `answer` gets right.

    `answer` takes conversations and returns one text each; any engine will do.
    """
    scores: dict[str, float] = {}
    for kind in GENERATORS:
        tasks = held_out_tasks(kind, number)
        outputs = answer([messages(task) for task in tasks])
        right = sum(check(task, output) for task, output in zip(tasks, outputs, strict=True))
        scores[kind] = right / len(tasks)
    return scores
