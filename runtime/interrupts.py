"""Ctrl-C and what must not be left half done.

Here: `unbroken`, `unwind`. Not here: processes that ignore Ctrl-C (``service``, ``parallel.rank``).
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def unbroken() -> Iterator[None]:
    """Put Ctrl-C off until the end of the block; elsewhere than in the main thread there is none.

    Within a step a `KeyboardInterrupt` would leave books half written, and ranks at odds about
    which step they are in.
    """
    handler = None
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        yield
        return
    arrived: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda _, frame: arrived.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if arrived:
            handler(signal.SIGINT, arrived[0])


def unwind() -> None:
    """Let whoever ends this process end it as Ctrl-C does, so that every context cleans up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
