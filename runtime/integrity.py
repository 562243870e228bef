"""Integrity: prepared weights against their checksums, while the engine serves from them.

    python -m fxlm.runtime.integrity FILE     0: whole, 1: damaged (which tensor: standard output)

A start maps the file and reads none of it, so what changed on a disk without a word (the same size
and time of modification) would be served. This reads it once, in a process that gets no core that
anyone else wants. Damage is logged and counted, and the note that vouches for the file goes, so
that the next start prepares the weights anew. Not here: files that were touched
(`fxlm.runtime.prepared` sees those when it opens them). Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from fxlm.compiler.errors import InvalidModel
from fxlm.models.safetensors_file import SafetensorsFile
from fxlm.runtime.lifeline import signal_at_the_end_of_our_parent
from fxlm.runtime.machine import step_aside

_log = logging.getLogger(__name__)

DELAY_S = 10.0  # the first requests after a start come first
PIECE_BYTES = 4 << 20  # a few ms each, and then a rest: engines share no core without a loss
REST_S = 0.05


def note_file(path: Path) -> Path:
    """Where the checksums of a file of prepared weights lie."""
    return path.with_suffix(".json")


def find_damage(path: Path, rest_s: float = 0.0) -> str | None:
    """What is wrong with a file, read whole, with a rest after each piece; None: nothing.

    Raises:
        OSError, ValueError, InvalidModel: the file or its note cannot be read.
    """
    note = json.loads(note_file(path).read_text())
    with path.open("rb") as file:
        for name, info in SafetensorsFile(path).tensors.items():
            file.seek(info.begin)
            left, checksum = info.num_bytes, 0
            while left and (data := file.read(min(PIECE_BYTES, left))):
                checksum, left = zlib.crc32(data, checksum), left - len(data)
                time.sleep(rest_s)
            if checksum != note["crc32"].get(name):
                return f"{name} does not have its checksum"
    return None


def watch(path: Path, told: Callable[[str], None], delay_s: float = DELAY_S) -> None:
    """Check a file beside this process.

    Args:
        path: of prepared weights.
        told: called from a thread of its own with ``whole`` or ``damaged``; not at all if the file
            went meanwhile, which others may do to make room.
        delay_s: before it begins.
    """
    command = [sys.executable, "-P", "-m", __name__, str(path), str(delay_s)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip

    def wait() -> None:
        said, _ = process.communicate()
        if process.returncode == 0:
            told("whole")
        elif process.returncode == 1 and said:
            note_file(path).unlink(missing_ok=True)
            _log.error("prepared weights %s are damaged (%s): answers cannot be trusted; a new "
                       "start prepares them anew", path, said.strip())  # fmt: skip
            told("damaged")

    threading.Thread(target=wait, name="integrity", daemon=True).start()


def main() -> int:
    """Entry of the process."""
    signal_at_the_end_of_our_parent(signal.SIGKILL)
    step_aside()
    path, delay_s = Path(sys.argv[1]), float(sys.argv[2])
    time.sleep(delay_s)
    with contextlib.suppress(OSError, ValueError, KeyError, InvalidModel):
        damage = find_damage(path, REST_S)
        if damage is not None:
            sys.stdout.write(damage)
        return 0 if damage is None else 1
    return 2


if __name__ == "__main__":
    sys.exit(main())
