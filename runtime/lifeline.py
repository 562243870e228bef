"""A child process that leaves with its parent.

Here: reading the first line of standard input, whose end then means that the parent is gone;
leaving.
Not here: what the child does (``service``, ``parallel.rank``).
"""

import atexit
import ctypes
import os
import signal
import sys
import threading
from typing import Any, NoReturn

EXIT_ORPHAN = 3
PR_SET_PDEATHSIG = 1


def read_line() -> bytes | None:
    """The first line of standard input; None if it ends before."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)  # unbuffered: what follows belongs to the lifeline
        if not byte:
            return None
        line += byte
    return bytes(line)


def signal_at_the_end_of_our_parent(number: int) -> None:
    """Have the kernel send a signal when the thread that started this process ends (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def watch_lifeline(parent: int) -> None:
    """Leave when standard input ends, or (Linux) when the kernel says that the parent died."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os._exit(EXIT_ORPHAN)

    def check(number: int, frame: Any) -> None:
        # Also sent when only the parent's thread that started us ended: then nothing is wrong.
        if os.getppid() != parent:
            os._exit(EXIT_ORPHAN)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
    if sys.platform == "linux":
        signal.signal(signal.SIGHUP, check)
        signal_at_the_end_of_our_parent(signal.SIGHUP)
    if os.getppid() != parent:  # it died before we watched
        os._exit(EXIT_ORPHAN)


def leave(code: int) -> NoReturn:
    """End this process, without taking the interpreter apart.

    Threads of Gloo may still hold tensors of steps that failed or were not waited for. Where one
    needs the interpreter when that is half gone, C++ ends the process with SIGABRT ("terminate
    called without an active exception").
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
