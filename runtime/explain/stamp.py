"""The stamp of an artifact: the errors that `fxlm verify` found, in a file of its own.

``verified.json`` lies beside the manifest and is no part of its digests. It holds for one
manifest and one set of weights; for any other it counts as absent, and so it does where its own
digest is not that of its content. Imports no torch.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fxlm.compiler.artifact import MANIFEST, Artifact, content_digest
from fxlm.compiler.cache import file_digest
from fxlm.compiler.errors import InvalidOption

FILE = "verified.json"
NOT_VERIFIED = "not verified: `fxlm verify` holds it against float32"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stamp:
    """What was found, and of what.

    Attributes:
        manifest: SHA-256 of the artifact's manifest.
        weights: digest of the checkpoint's weights.
        date: of the run, ISO 8601.
        dtype: of the model.
        errors: by mode, what `fxlm.runtime.explain.compare.Errors.as_json` gives.
        rounding: error of the captured graph itself in this dtype, in nats.
        tolerance: of the largest error of a mode, in nats.
        typical_tolerance: of the root mean square of a mode, in nats.
        column: largest error of the passes in float32, in nats; None: not held.
        faults: what is above its limit, in words; empty if nothing is.
    """

    manifest: str
    weights: str
    date: str
    dtype: str
    errors: Mapping[str, Mapping[str, Any]]
    rounding: float
    tolerance: float
    typical_tolerance: float
    column: float | None
    faults: list[str]

    @property
    def passed(self) -> bool:
        """Whether nothing is above its limit."""
        return not self.faults

    @property
    def largest(self) -> float:
        """Largest error of all modes, in nats."""
        return max(float(found["absolute"]) for found in self.errors.values())

    def line(self) -> str:
        """The stamp as a line."""
        agreement = min(float(found["agreement"]) for found in self.errors.values())
        verdict = "verified" if self.passed else "VERIFIED AND FOUND WRONG"
        column = "" if self.column is None else f", passes in float32 {self.column:.2g}"
        return "; ".join([
            f"{verdict} {self.date[:10]}: largest error {self.largest:.2g} nats against float32 "
            f"(tolerance {self.tolerance:.2g}){column}, top-1 {agreement:.1%}",
            *self.faults,
        ])  # fmt: skip


def require_writable(artifact: Artifact) -> None:
    """Tell before minutes of work that its result cannot be put there.

    Raises:
        InvalidOption: the artifact cannot be written.
    """
    try:
        with tempfile.TemporaryFile(dir=artifact.path):
            pass
    except OSError as error:
        raise _refused(artifact, error) from error


def write(artifact: Artifact, stamp: Stamp) -> None:
    """Put the stamp into the artifact, whole or not at all.

    Raises:
        InvalidOption: the artifact cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{FILE}.", dir=artifact.path)
        with os.fdopen(handle, "w") as file:
            content = asdict(stamp)
            json.dump({**content, "digest": content_digest(content)}, file, indent=1)
        os.chmod(name, 0o644)
        os.replace(name, artifact.path / FILE)
    except OSError as error:
        raise _refused(artifact, error) from error


def _refused(artifact: Artifact, error: OSError) -> InvalidOption:
    reason = f"the stamp cannot be written there ({error.strerror}); verify a copy of your own"
    return InvalidOption("artifact", str(artifact.path), reason)


def read(artifact: Artifact, weights: str) -> Stamp | None:
    """The stamp, if it is of this very artifact and of these weights."""
    try:
        found = json.loads((artifact.path / FILE).read_text())
        digest = found.pop("digest")
        stamp = Stamp(**{f.name: found[f.name] for f in fields(Stamp)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if digest != content_digest(found):
        return None
    same = stamp.manifest == manifest_digest(artifact) and stamp.weights == weights
    return stamp if same and stamp.errors else None


def line(artifact: Artifact, weights: str) -> str:
    """The stamp as a line, or that there is none."""
    stamp = read(artifact, weights)
    return NOT_VERIFIED if stamp is None else stamp.line()


def manifest_digest(artifact: Artifact) -> str:
    """SHA-256 of the manifest."""
    return file_digest(artifact.path / MANIFEST)
