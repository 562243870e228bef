"""Ahead: regions compiled by a child process while the whole model is still captured.

Layers alike are one region, so a model's first layers have the regions of the whole, and are
captured and rewritten in a second. A fork of this process compiles them into the pool of regions
on a core that would be idle meanwhile. What the whole model turns out to need beyond that is
compiled as ever: regions are found by their digests, so a wrong guess costs time and nothing else.
Not here: how a region is compiled (`fxlm.compiler.lower`), the pool (`compile`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fxlm.compiler.options import CompileOptions
from fxlm.compiler.outline import Outline, cuts_deeper
from fxlm.models.checkpoint import Checkpoint
from fxlm.models.shorten import num_layers, shorten
from fxlm.runtime import machine
from fxlm.runtime.front import front
from fxlm.runtime.interrupts import unwind
from fxlm.runtime.lifeline import signal_at_the_end_of_our_parent

_log = logging.getLogger(__name__)

WORTH = 4  # times as many layers as the first ones; below, capturing those saves nothing
HARMLESS = {"MainThread", "lifeline"}  # threads that hold no lock while they wait


def first_layers(checkpoint: Checkpoint, options: CompileOptions) -> int:
    """How many of a model's layers hold one of each kind; 0 where they are not worth compiling.

    Args:
        checkpoint: opened.
        options: of the compilation.
    """
    total = num_layers(checkpoint.config)
    config = checkpoint.config.get("text_config") or checkpoint.config
    kinds = config.get("layer_types")
    count = 2
    if isinstance(kinds, list) and len(kinds) == total:
        count = max(count, 1 + max(kinds.index(kind) for kind in kinds))
    # Points name layers, passes of a user may have effects, stages are cut by depth.
    plain = not (options.passes or options.tap or options.steer or options.eager)
    alone = options.stages == 1 and options.ranks == 1
    if not (plain and alone and options.device.startswith("cpu")):
        return 0
    return count if count * WORTH <= total and machine.num_cores()[0] > 1 and _may_fork() else 0


def _may_fork() -> bool:
    """Whether a copy of this thread alone can work: no other may hold a lock when it is made."""
    return (
        sys.platform == "linux"
        and threading.current_thread() is threading.main_thread()
        and {thread.name for thread in threading.enumerate()} <= HARMLESS
    )


def outline_first(checkpoint: Checkpoint, options: CompileOptions, count: int) -> Outline | None:
    """The regions of a model's first layers; None if the whole model would not be cut.

    Args:
        checkpoint: of the whole model.
        options: of the compilation.
        count: layers; see `first_layers`.
    """
    from fxlm.compiler.hoist import hoist
    from fxlm.compiler.outline import outline
    from fxlm.compiler.pipeline import run

    with tempfile.TemporaryDirectory(prefix="fxlm-") as place:
        start = front(shorten(checkpoint, count, Path(place)), options)
    plan = outline(hoist(run(start.program, start.column)).step, cut=True)
    more = num_layers(checkpoint.config) - count
    return plan if cuts_deeper(plan, more) else None


@contextlib.contextmanager
def forked(work: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Run ``work`` in a copy of this process.

    Yields a function that waits for it; whether it succeeded shows in what it left. It ends with
    the block at the latest, and with this process.
    """
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _run(work, parent)
    left = [child]

    def wait() -> None:
        while left:
            os.waitpid(left[0], 0)
            left.clear()

    try:
        yield wait
    finally:
        if left:
            os.kill(child, signal.SIGTERM)
        wait()


def _run(work: Callable[[], None], parent: int) -> None:
    """The child's life; never returns."""
    status = 1
    try:
        unwind()
        signal_at_the_end_of_our_parent(signal.SIGTERM)
        if os.getppid() == parent:
            torch.set_num_threads(1)  # the threads of the parent's pool are not in the copy
            work()
            status = 0
    except KeyboardInterrupt:
        pass
    except BaseException as error:
        _log.info("compiling ahead failed: %s", error)
    finally:
        os._exit(status)
