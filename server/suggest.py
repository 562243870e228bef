"""Nearest names, for messages about a name that does not exist."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like `name`, or None when none looks alike."""
    plain = {item.replace("_", "-").lower(): item for item in known}
    found = difflib.get_close_matches(name.replace("_", "-").lower(), plain, n=1, cutoff=0.6)
    return plain[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean x?`` (with its leading space), or nothing."""
    found = nearest(name, known)
    return f" Did you mean {found}?" if found is not None else ""
