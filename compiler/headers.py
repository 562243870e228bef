"""Headers: what generated sources begin with, precompiled and kept by content.

Nine tenths of the time that g++ takes for a source of Inductor's go into the headers it includes,
which are the same for every kernel, and for every wrapper. A precompiled header is named by a
digest of the compiler, its flags and the preprocessed text, so another torch or compiler has
another. The compiler itself refuses one that does not suit its flags or the machine, and reads the
header instead. Not here: when one is worth making (`builds`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

_NAME = "begin.h"
_LEADING = re.compile(r"(?:\s*//[^\n]*\n|\s*#include <[^>\n]+>\n)*")


def leading(source: str) -> str:
    """The includes that a C++ source begins with, a line each; empty if there are none."""
    match = _LEADING.match(source)
    lines = match[0].splitlines() if match else []
    return "".join(f"{line.strip()}\n" for line in lines if line.strip().startswith("#include"))


def find(
    command: Sequence[str],
    includes: str,
    store: Path,
    work: Path,
    run: Callable[[list[str]], None] | None,
) -> Path | None:
    """The header that stands for ``includes``, with its precompiled form beside it.

    Args:
        command: the compiler and its flags, without input and output.
        includes: see `leading`.
        store: folder in which it is kept.
        work: an empty folder, in the file system of ``store``.
        run: runs a command, to make it if the store lacks it; None: do not.

    Returns:
        What ``-include`` takes, or None if there is none.
    """
    notes = _Notes(store, [*command, includes])
    if (known := notes.read()) is not None:
        return known / _NAME
    header = work / _NAME
    header.write_text(includes)
    digest, files = _digest([*command, "-x", "c++-header", str(header)], work)
    kept = store / f"headers-{digest}"
    if not kept.exists():
        if run is None:
            return None
        run([*command, "-x", "c++-header", str(header), "-o", f"{header}.gch"])
        try:
            os.rename(work, kept)
        except OSError:  # another process was first
            assert kept.exists(), kept
        else:
            work.mkdir()  # whoever made it removes it
    notes.write(kept, [file for file in files if file != str(header)])
    return kept / _NAME


def _digest(command: list[str], work: Path) -> tuple[str, list[str]]:
    """Of the compiler, the flags and the text that comes of them; and the files read for it."""
    rule = work / "files.d"
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    read = [*command, "-E", "-P", "-MD", "-MF", str(rule)]
    text = subprocess.run(read, capture_output=True, check=True).stdout
    flags = "\0".join(command[:-1]).encode()
    files = shlex.split(rule.read_text().replace("\\\n", " "))[1:]  # behind "target:"
    rule.unlink()
    return hashlib.sha256(b"\0".join([version, flags, text])).hexdigest()[:32], files


class _Notes:
    """Which header answered a question, and the state of every file that it came from.

    Asking the compiler for the preprocessed text takes most of a second; asking the file system
    whether these files are as they were, a few milliseconds.
    """

    def __init__(self, store: Path, question: list[str]) -> None:
        self._store = store
        self._compiler = shutil.which(question[0]) or question[0]
        digest = hashlib.sha256("\0".join(question).encode()).hexdigest()[:32]
        self._path = store / f"headers-{digest}.json"

    def read(self) -> Path | None:
        """The header, if nothing changed."""
        try:
            noted = json.loads(self._path.read_text())
            kept = self._store / noted["kept"]
            same = all(_state(file) == state for file, state in noted["files"].items())
        except (OSError, ValueError, KeyError):
            return None
        return kept if same and kept.exists() else None

    def write(self, kept: Path, files: list[str]) -> None:
        """Note it, whole or not at all."""
        states = {file: _state(file) for file in (self._compiler, *files)}
        work = self._path.with_suffix(f".{os.getpid()}.tmp")
        work.write_text(json.dumps({"kept": kept.name, "files": states}))
        work.replace(self._path)


def _state(file: str) -> list[int]:
    found = os.stat(file)
    return [found.st_size, found.st_mtime_ns, found.st_ino]
