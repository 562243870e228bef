"""The nearest of the names that exist, for messages about one that does not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like `name`, whatever its case and hyphens; None if none."""
    plain = {item.replace("_", "-").lower(): item for item in known}
    found = difflib.get_close_matches(name.replace("_", "-").lower(), plain, n=1, cutoff=0.6)
    return plain[found[0]] if found else None


def hint(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """``did you mean 'x'?``, or `otherwise` where no name looks alike."""
    found = nearest(name, known)
    return f"did you mean {found!r}?" if found is not None else otherwise


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean x?`` (with its leading space), or nothing."""
    found = nearest(name, known)
    return f" Did you mean {found}?" if found is not None else ""
