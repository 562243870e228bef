"""One rank that is not 0: it compiles or finds its artifact, loads, and runs what it is told.

    python -m fxlm.runtime.parallel.rank     reads a `RankSpec` as one line of JSON on stdin

Here: the loop and its end. Not here: rank 0 (``build``), its view of the others (``ranks``).
It leaves when rank 0 does, and tells the reason when it ends by itself.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

import msgspec
import torch
import zmq

from fxlm.compiler.errors import FxlmError, PeersLost
from fxlm.runtime.compile import compile_for
from fxlm.runtime.lifeline import EXIT_ORPHAN, leave, read_line, watch_lifeline
from fxlm.runtime.options import from_mapping
from fxlm.runtime.parallel.channel import Listener, Teller
from fxlm.runtime.parallel.member import Member, share_cores
from fxlm.runtime.parallel.messages import (
    Copy,
    Find,
    Join,
    Joined,
    Leave,
    Load,
    Loaded,
    Lost,
    Planned,
    Pulse,
    RankSpec,
    Run,
    spec_of,
    spec_values,
    unpack,
)
from fxlm.runtime.parallel.place import place_of

EXIT_FATAL = 1
PULSE_S = 1.0


def serve(spec: RankSpec) -> int:
    """Run until told to leave; gives the exit code."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    teller = Teller(context, spec)
    over = threading.Event()
    pulse = threading.Thread(target=_beat, args=(context, spec, over), daemon=True)
    pulse.start()
    try:
        _loop(context, spec, teller)
        return 0
    except Exception as error:  # whatever ends this rank ends the engine, with these words
        known = isinstance(error, FxlmError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        if not known:
            sys.excepthook(type(error), error, error.__traceback__)
        teller.tell(Lost(spec.rank, reason, not isinstance(error, PeersLost)))
        return EXIT_FATAL
    finally:
        over.set()
        pulse.join()
        teller.close()
        context.destroy(linger=2000)


def _loop(context: zmq.Context[zmq.Socket[bytes]], spec: RankSpec, teller: Teller) -> None:
    options = from_mapping(spec.options)
    listener = Listener(context, spec)
    share_cores(options, spec.local_ranks)
    if torch.cuda.is_available():
        torch.cuda.set_device(spec.local_rank)  # one device a rank
    member = Member(options, place_of(options, spec.rank), spec.local_ranks)
    while True:
        order, tensors = unpack(listener.receive())
        match order:
            case Find():
                plan = member.plan(compile_for(options, rank=spec.rank))
                teller.tell(Planned(spec.rank, os.getpid(), spec_values(plan.spec)))
            case Load(sizes):
                member.load(spec_of(sizes))
                teller.tell(Loaded(spec.rank))
            case Join():
                member.join(spec.store, spec.host)
                teller.tell(Joined(spec.rank))
            case Run():
                member.run(tensors)
            case Copy(pairs):
                member.worker.copy_blocks(pairs)
            case Leave():
                listener.close()
                return


def _beat(context: zmq.Context[zmq.Socket[bytes]], spec: RankSpec, over: threading.Event) -> None:
    """Tell rank 0 regularly that this process runs."""
    teller = Teller(context, spec)
    while not over.wait(PULSE_S):
        teller.tell(Pulse(spec.rank))
    teller.close()


def main() -> int:
    """Entry of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = read_line()
    if line is None:
        return EXIT_ORPHAN
    spec = msgspec.json.decode(line, type=RankSpec)
    sys.path[:] = [*spec.paths, *(p for p in sys.path if p not in spec.paths)]
    watch_lifeline(spec.parent_pid)
    return serve(spec)


if __name__ == "__main__":
    leave(main())
