"""Tiered start: serve from the uncompiled graph while another process compiles it.

    python -m fxlm.runtime.tiers      reads an engine's options as one line of JSON on stdin

The process captures the model and writes two artifacts: first that of the graph alone, which the
engine interprets (same weights, same results up to rounding), then the compiled one, which the
engine takes over between two steps. The engine thus never imports what compiles. Standard input
is the process's lifeline: when it ends, the process ends, and cleans up behind itself. Not here:
compiling (`compile`), the swap (`fxlm.runtime.worker`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fxlm.compiler.artifact import Artifact, open_artifact
from fxlm.compiler.cache import cache_directory
from fxlm.compiler.errors import ArtifactError, FxlmError
from fxlm.runtime.cache import Miss, eager, look_up, target_of
from fxlm.runtime.compile import Compilation, Report, compile_for, open_for
from fxlm.runtime.interrupts import unwind
from fxlm.runtime.options import EngineOptions, compile_options, from_mapping

NICENESS = 5  # of the compiling process, so that serving goes first


class Background:
    """A process that compiles a model.

    Args:
        options: of the engine.
        report: called with (stage, seconds) as its stages end.
    """

    def __init__(self, options: EngineOptions, report: Report | None = None) -> None:
        self._report = report
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fxlm.runtime.tiers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        values = replace(options, tiered_start=False).as_json()
        self._process.stdin.write(json.dumps(values) + "\n")
        self._process.stdin.flush()  # stays open: its end tells the process that we are gone

    def next_artifact(self) -> Artifact:
        """Wait for the next artifact: of the graph, then compiled.

        Raises:
            FxlmError: the model or its options are at fault, or the process died.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            kind, *values = json.loads(line)
            if kind == "stage" and self._report is not None:
                self._report(*values)
            elif kind == "artifact":
                return open_artifact(Path(values[0]))
            elif kind == "failed":
                raise FxlmError(values[0])
        raise FxlmError(f"the compiling process ended with status {self._process.wait()}")

    def then(self, take: Callable[[Artifact], None], fail: Callable[[str], None]) -> None:
        """Call ``take`` with the compiled artifact once it is there, or ``fail`` with a reason.

        Either is called from a thread of its own.
        """

        def wait() -> None:
            try:
                take(self.next_artifact())
                wake()
            except FxlmError as error:
                fail(str(error))
            finally:
                self.close()

        threading.Thread(target=wait, name="tier", daemon=True).start()

    def close(self) -> None:
        """End the process, if it still runs, and wait for it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def first_tier(
    options: EngineOptions, report: Report | None = None
) -> tuple[Compilation, Background | None]:
    """What can serve first, and the process that makes the rest (None: nothing is left).

    Args:
        options: of the engine; without ``tiered_start`` the artifact is made here and now.
        report: called with (stage, seconds) as stages end.

    Raises:
        FxlmError: see `compile_for`.
    """
    if not options.tiered_start or options.enforce_eager or options.frozen is not None:
        return compile_for(options, report=report), None
    checkpoint = open_for(options)
    target = target_of(checkpoint, compile_options(options), cache_directory(options.cache_dir))
    found = look_up(target)
    if isinstance(found, Artifact):
        return Compilation(artifact=found, checkpoint=checkpoint), None
    background = Background(options, report)
    try:
        graph = look_up(eager(target))
        artifact = background.next_artifact() if isinstance(graph, Miss) else graph
    except BaseException:
        background.close()
        raise
    first = Compilation(artifact=artifact, checkpoint=checkpoint, miss=found)
    if artifact.compiled:  # another process made it while ours waited
        background.close()
        return first, None
    return first, background


def wake() -> None:
    """Let an idle service notice, if this process runs one (then it handles this signal)."""
    if callable(signal.getsignal(signal.SIGUSR1)):
        os.kill(os.getpid(), signal.SIGUSR1)


def check_same(first: Artifact, second: Artifact) -> None:
    """Raise `ArtifactError` unless a step of the second runs on memory of the first."""
    for part in ("weights", "caches", "step_inputs", "results"):
        if first.manifest[part] != second.manifest[part]:
            raise ArtifactError(f"{second.path} has other {part} than {first.path}")


# ---- the process -----------------------------------------------------------------------------


def main() -> int:
    """Entry of the process: compile, and say so line by line on standard output."""
    unwind()  # the engine's process ignores Ctrl-C
    options = from_mapping(json.loads(sys.stdin.readline()))
    os.nice(NICENESS)
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no message of ours
    try:
        lifeline = (sys.stdin.fileno(),)
        threading.Thread(target=_watch, args=lifeline, name="lifeline", daemon=True).start()
        try:
            _compile(options, lambda *message: said.write(json.dumps(message) + "\n"))
        finally:
            _end_quietly()
    except (KeyboardInterrupt, BrokenPipeError):
        return 130
    return 0


def _compile(options: EngineOptions, say: Callable[..., Any]) -> None:
    try:
        made = compile_for(
            options,
            report=lambda stage, seconds: say("stage", stage, seconds),
            on_graph=lambda artifact: say("artifact", str(artifact.path)),
        )
    except FxlmError as error:
        say("failed", str(error))
    except Exception as error:  # a fault of ours: told, and shown
        say("failed", f"{type(error).__name__}: {error}")
        raise
    else:
        say("artifact", str(made.artifact.path))


def _end_quietly() -> None:
    """The work is over: what would stop it now would only break the end of the process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _watch(lifeline: int) -> None:
    while os.read(lifeline, 4096):
        pass
    os.kill(os.getpid(), signal.SIGINT)  # so that every context cleans up


if __name__ == "__main__":
    sys.exit(main())
