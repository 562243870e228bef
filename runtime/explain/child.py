"""Builds the page of a served model in a process of its own, beside the engine.

    python -m fxlm.runtime.explain.child      reads `Job` as one line of JSON on stdin

It is the lowest in priority and has one thread, and runs no numbers for a model whose weights
exceed `NUMBERS_BYTES`: serving comes first. Not here: who asks (`fxlm.server.explorer`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from fxlm.compiler.errors import FxlmError

NUMBERS_BYTES = 64 << 20
NICE = 19


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to build: the engine's options as plain values, and the file to write."""

    options: dict[str, Any]
    output: str


def build(job: Job) -> None:
    """Write the page, whole or not at all."""
    from fxlm.models.checkpoint import open_checkpoint
    from fxlm.runtime.explain.page import render
    from fxlm.runtime.explain.report import Choices, explain
    from fxlm.runtime.options import compile_options, from_mapping
    from fxlm.runtime.worker import set_threads

    set_threads(1)
    options = from_mapping(job.options)
    checkpoint = open_checkpoint(options.model, options.revision, options.trust_remote_code)
    numbers = checkpoint.num_bytes <= NUMBERS_BYTES
    choices = Choices(numbers=numbers, times="none", limits=False)
    page = render(explain(checkpoint, compile_options(options), choices))
    unfinished = Path(job.output).with_suffix(".tmp")
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(job.output)


def main() -> None:
    """Read the job, step aside, build."""
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    os.nice(NICE)
    try:
        build(job)
    except FxlmError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
