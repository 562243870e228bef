"""What the comparison says to an engine: a JSON object a line, in and out. Standard library only.

A driver is a script run by the engine's own Python. It loads the model once, says that it is
ready, and answers measurements until its input ends:

    -> {"do": "prefill", "tokens": 512}
    <- {"seconds": 0.61}                               of one prompt, fresh tokens each time
    -> {"do": "decode", "batch": 8, "context": 256, "steps": 16}
    <- {"seconds": 0.071}                              median of the steps
    -> {"do": "memory"}
    <- {"peak_rss_bytes": 3100000000}                  of the driver and its children

What the engine prints must not reach the pipe: `serve` keeps the pipe for itself and points
standard output at standard error.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Engine(Protocol):
    """A loaded model.

    Attributes:
        keeps_prefixes: the prompts of a decode row are prefilled one by one when first seen and
            found in its cache from then on; otherwise `decode` fills its cache each time.
    """

    version: str
    keeps_prefixes: bool

    def prefill(self, prompt: list[int]) -> float:
        """Seconds until the first token of a prompt that was never seen."""
        ...

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """Median seconds of a step in which every sequence gets a token."""
        ...


def prompts(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Random token ids; the same for the same seed."""
    draw = random.Random(seed)
    return [[draw.randrange(3, vocabulary) for _ in range(length)] for _ in range(count)]


def serve(load: Callable[[], Engine], vocabulary: int) -> None:
    """Load the engine and answer until standard input ends."""
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    started = time.perf_counter()
    engine = load()
    ready = time.perf_counter() - started
    print(json.dumps({"ready": round(ready, 2), "version": engine.version}), file=pipe)
    seen: set[tuple[int, int]] = set()
    fresh = 1 << 20  # seeds of prompts that are never repeated
    for line in sys.stdin:
        order = json.loads(line)
        fresh += 1
        print(json.dumps(_answer(engine, order, vocabulary, fresh, seen)), file=pipe)


def _answer(
    engine: Engine, order: dict[str, Any], vocabulary: int, fresh: int, seen: set[tuple[int, int]]
) -> dict[str, Any]:
    try:
        if order["do"] == "memory":
            return {"peak_rss_bytes": peak_rss_bytes()}
        if order["do"] == "prefill":
            (prompt,) = prompts(1, order["tokens"], vocabulary, fresh)
            return {"seconds": engine.prefill(prompt)}
        # The same prompts in every block: an engine with a prefix cache fills it once.
        batch = prompts(order["batch"], order["context"], vocabulary, order["batch"])
        if engine.keeps_prefixes and (order["batch"], order["context"]) not in seen:
            seen.add((order["batch"], order["context"]))
            for prompt in batch:
                engine.prefill(prompt)
        return {"seconds": engine.decode(batch, order["steps"])}
    except Exception as error:  # whatever a peer raises: the comparison goes on without the row
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def peak_rss_bytes(pid: int | None = None) -> int:
    """Sum of the peaks of a process (this one) and of all its descendants alive."""
    total, todo = 0, [os.getpid() if pid is None else pid]
    while todo:
        folder = Path("/proc") / str(todo.pop())
        try:
            for line in (folder / "status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    total += int(line.split()[1]) * 1024
            for task in (folder / "task").iterdir():
                todo += [int(p) for p in (task / "children").read_text().split()]
        except OSError:  # it ended meanwhile
            continue
    return total
