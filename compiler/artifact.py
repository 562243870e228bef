"""Artifact: a compiled model without its weights, as a relocatable directory.

    manifest.json          key and its factors, passes, calls, weights, caches, file digests, and
                           the digest of all this
    load.json              graph from checkpoint tensors to prepared weights
    constants.safetensors  small tensors computed from the config (rotary frequencies...)
    regions/NAME.json      each region as a graph; NAME.pt2 as a compiled package
    model/                 config, tokenizer, chat template, generation defaults

Nothing in it is unpickled, no path in it is absolute. It is written under a temporary name
and renamed, and digests are checked when it is opened. Not here: what goes into the key
(`key`), compiling (`lower`), running (`step`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxlm.compiler.cache import file_digest
from fxlm.compiler.errors import ArtifactError
from fxlm.compiler.program import CacheSpec

FORMAT = 2
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Type of a prepared weight: dtype name, sizes and strides in elements."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count * dtype_of(self.dtype).itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """An opened artifact directory; ``manifest`` is its content as JSON gave it."""

    path: Path
    manifest: dict[str, Any]

    @property
    def key(self) -> str:
        """Content key under which it was cached."""
        return str(self.manifest["key"])

    @property
    def compiled(self) -> bool:
        """Whether it holds compiled packages (else its regions are interpreted)."""
        return bool(self.manifest["compiled"])

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    def caches(self) -> list[CacheSpec]:
        """KV memory of each attention layer."""
        return [
            CacheSpec(
                num_kv_heads=c["num_kv_heads"], key_dim=c["key_dim"], value_dim=c["value_dim"],
                dtype=dtype_of(c["dtype"]),
            )
            for c in self.manifest["caches"]
        ]  # fmt: skip

    def weights(self) -> dict[str, TensorSpec]:
        """Prepared weights by name."""
        return {
            name: TensorSpec(dtype=w["dtype"], shape=tuple(w["shape"]), stride=tuple(w["stride"]))
            for name, w in self.manifest["weights"].items()
        }

    def read_json(self, name: str) -> Any:
        """Content of one of its JSON files."""
        return json.loads((self.path / name).read_text())


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name such as ``bfloat16``."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ArtifactError(f"unknown dtype {name!r} in the artifact")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, e.g. ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def open_artifact(path: Path) -> Artifact:
    """Open a directory and check it.

    Raises:
        ArtifactError: no artifact, another format, or a file that is missing, damaged or
            unreadable.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        raise ArtifactError(f"{path} is no artifact: it has no {MANIFEST}") from None
    except OSError as error:
        raise ArtifactError(f"{path / MANIFEST} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ArtifactError(f"{path / MANIFEST} is damaged: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise ArtifactError(f"{path} has format {found!r}; this build reads {FORMAT}")
    if manifest.pop("digest", None) != content_digest(manifest):
        raise ArtifactError(f"{path / MANIFEST} is damaged: its digest is not that of its content")
    for name, entry in manifest["files"].items():
        _check_file(path / name, entry)
    return Artifact(path=path, manifest=manifest)


def is_manifest(path: Path) -> bool:
    """Whether a file is an artifact's manifest, of whatever format."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"format", "key", "files"} <= set(content)


def _check_file(path: Path, entry: dict[str, Any]) -> None:
    try:
        size = path.stat().st_size
        digest = file_digest(path) if size == entry["bytes"] else ""
    except FileNotFoundError:
        raise ArtifactError(f"the artifact lacks {path.name}") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None
    if digest != entry["sha256"]:
        raise ArtifactError(f"{path} is damaged: its digest is not the one in {MANIFEST}")


def content_digest(content: Any) -> str:
    """SHA-256 of what JSON can hold, as hexadecimal digits; the order of keys does not count."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process makes ``path``, the others wait; in a read-only folder nothing is locked."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = (path.parent / f".{path.name}.lock").open("w")
    except OSError:
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes ``path`` if the block succeeds.

    An artifact that stands there already is replaced; readers see the old one or the new one.
    The caller holds the lock (`locked`): what a process that was killed left here is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield work
        os.chmod(work, 0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.rename(path, old / "artifact")
            os.rename(work, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(work, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_manifest(work: Path, content: dict[str, Any]) -> None:
    """Add the digests of each file and of the whole to ``content``; write it as the manifest."""
    files = {
        str(file.relative_to(work)): {"bytes": file.stat().st_size, "sha256": file_digest(file)}
        for file in sorted(work.rglob("*"))
        if file.is_file()
    }
    whole = json.loads(json.dumps({"format": FORMAT, **content, "files": files}))
    text = json.dumps({**whole, "digest": content_digest(whole)}, indent=1)
    (work / MANIFEST).write_text(text + "\n")
