"""Reports that are kept in the cache, so that a page is made once.

`fxlm explain` leaves its report there, and so does a server whose `/compiler` somebody asked for;
whoever comes later renders what is there. A report is named by what it is of: the key of the
artifact, the weights, and the code that made it. Not here: what is in one (`report`).
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fxlm.compiler import key
from fxlm.compiler.options import CompileOptions
from fxlm.models.checkpoint import Checkpoint
from fxlm.runtime.cache import target_of

MOST = 32  # reports; some hundred KB each


def place_of(checkpoint: Checkpoint, options: CompileOptions, root: Path) -> Path:
    """The file of a model's report, in the cache at ``root``."""
    target = target_of(checkpoint, replace(options, eager=False), root)
    code = key.source_digest("runtime/explain")
    name = key.digest([target.key, checkpoint.weights_digest(), code])
    return root / "explain" / f"{name[:32]}.json"


def read(path: Path) -> dict[str, Any] | None:
    """A report; None if there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "passes" in found else None


def keep(report: Mapping[str, Any], path: Path) -> None:
    """Put a report in its place, and let the oldest go; a read-only cache stays as it is."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=".report.", delete=False
        ) as file:
            json.dump(report, file)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
        files = sorted(path.parent.glob("*.json"), key=lambda item: item.stat().st_mtime)
        for old in files[:-MOST]:
            old.unlink(missing_ok=True)
