"""Builds the page of a served model in a process of its own, beside the engine.

    python -m fxlm.runtime.explain.child      reads `Job` as one line of JSON on stdin

It says what it is at, a line each, on standard output. A report that is kept is rendered; else one
is made and kept. Serving comes first: this process has one thread, runs on cores that nobody wants,
takes half of the memory that is free beyond the weights at most, and is the first to go when there
is none. Not here: who asks (`fxlm.server.explorer`).
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import msgspec

from fxlm.compiler.errors import FxlmError
from fxlm.runtime.lifeline import signal_at_the_end_of_our_parent
from fxlm.runtime.machine import step_aside


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to build: the engine's options as plain values, and the file to write."""

    options: dict[str, Any]
    output: str


def build(job: Job) -> None:
    """Write the page, whole or not at all."""
    from fxlm.compiler.cache import cache_directory
    from fxlm.models.checkpoint import open_checkpoint
    from fxlm.runtime.explain import kept
    from fxlm.runtime.explain.page import render
    from fxlm.runtime.explain.report import Choices, explain
    from fxlm.runtime.options import compile_options, from_mapping
    from fxlm.runtime.worker import set_threads

    set_threads(1)
    options = from_mapping(job.options)
    checkpoint = open_checkpoint(options.model, options.revision, options.trust_remote_code)
    choices = compile_options(options)
    place = kept.place_of(checkpoint, choices, cache_directory(options.cache_dir))
    report = kept.read(place)
    if report is None:
        report = explain(checkpoint, choices, Choices(beside=True), tell=_say)
        kept.keep(report, place)
    unfinished = Path(job.output).with_suffix(".tmp")
    unfinished.write_text(render(report), encoding="utf-8")
    unfinished.replace(job.output)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Read the job, step aside, build."""
    signal_at_the_end_of_our_parent(signal.SIGKILL)
    step_aside()
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    try:
        build(job)
    except FxlmError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
