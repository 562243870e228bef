"""Where this user's caches are (artifacts, libraries of ops, headers of GGUF files), and how
what lies there is told from what is damaged."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def cache_directory(choice: str | Path | None = None) -> Path:
    """The choice, or ``$XDG_CACHE_HOME/fxlm``, or ``~/.cache/fxlm``."""
    if choice is not None:
        return Path(choice).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fxlm"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
