"""Headers: what generated sources begin with, precompiled and kept by content.

Nine tenths of the time that g++ takes for a source of Inductor's go into the headers it includes,
which are the same for every kernel, and for every wrapper. A precompiled header is named by a
digest of the compiler, its flags and the preprocessed text, so another torch or compiler has
another. The compiler itself refuses one that does not suit its flags or the machine, and reads the
header instead. Not here: when one is worth making (`builds`).
"""

from __future__ import annotations

import hashlib
import os
import re
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
    header = work / _NAME
    header.write_text(includes)
    kept = store / f"headers-{_digest([*command, '-x', 'c++-header', str(header)])}"
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
    return kept / _NAME


def _digest(command: list[str]) -> str:
    """Of the compiler, the flags, and the text that comes of them."""
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    text = subprocess.run([*command, "-E", "-P"], capture_output=True, check=True).stdout
    flags = "\0".join(command[:-1]).encode()
    return hashlib.sha256(b"\0".join([version, flags, text])).hexdigest()[:32]
