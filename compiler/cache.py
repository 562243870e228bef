"""Where this user's caches are: artifacts, libraries of ops, headers of GGUF files."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory(choice: str | Path | None = None) -> Path:
    """The choice, or ``$XDG_CACHE_HOME/fxlm``, or ``~/.cache/fxlm``."""
    if choice is not None:
        return Path(choice).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fxlm"
