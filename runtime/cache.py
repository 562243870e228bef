"""The cache of artifacts: where one belongs, whether it is there, and why not.

Here: the key of a checkpoint under its options, the factors in which two keys differ, the nearest
artifact, and artifacts that are taken as they are (``--frozen``). Not here: what is hashed
(`fxlm.compiler.key`), making an artifact (`compile`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fxlm.compiler import artifact as artifacts
from fxlm.compiler import key as keys
from fxlm.compiler.artifact import Artifact, dtype_name
from fxlm.compiler.errors import ArtifactError
from fxlm.compiler.options import CompileOptions
from fxlm.models.checkpoint import Checkpoint
from fxlm.models.rope import follows_length
from fxlm.runtime.front import column_of, resolved

# What compiled an artifact, but is not needed to run it.
TOOLS = ("device.compiler", "versions.transformers", "versions.triton")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The artifact that a checkpoint needs under its options.

    Attributes:
        path: where it is, or belongs.
        key: digest of the factors.
        factors: see `fxlm.compiler.key.factors`.
        options: with each choice resolved.
    """

    path: Path
    key: str
    factors: dict[str, Any]
    options: CompileOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A factor that is not the same in two keys; empty where it is missing."""

    name: str
    ours: str
    theirs: str

    def __str__(self) -> str:
        return f"{self.name}: {shortened(self.ours)} here, {shortened(self.theirs)} there"


@dataclass(frozen=True, kw_only=True, slots=True)
class Miss:
    """Why an artifact is not taken from the cache.

    Attributes:
        kind: ``absent``, ``damaged`` (or unreadable) or ``changed``.
        text: a sentence.
    """

    kind: str
    text: str


def target_of(
    checkpoint: Checkpoint, options: CompileOptions, root: Path, output: Path | None = None
) -> Target:
    """The artifact of a checkpoint, in the cache at ``root`` or at ``output``."""
    options, dtype = resolved(checkpoint, options)
    column = column_of(options)
    length = options.max_model_len if follows_length(checkpoint.config) else None
    factors = keys.factors(checkpoint.digest(), dtype_name(dtype), options, column, length)
    key = keys.digest(factors)
    path = output.resolve() if output is not None else root / "artifacts" / key[:32]
    return Target(path=path, key=key, factors=factors, options=options)


def eager(target: Target) -> Target:
    """The target of the same graphs left uncompiled, in the same folder."""
    factors = {**target.factors, "eager": True}
    key = keys.digest(factors)
    options = replace(target.options, eager=True)
    return Target(path=target.path.parent / key[:32], key=key, factors=factors, options=options)


def look_up(target: Target) -> Artifact | Miss:
    """The artifact, if it is there, whole, and the one; else why not."""
    try:
        there = (target.path / artifacts.MANIFEST).exists()
    except OSError as error:
        return Miss(kind="damaged", text=f"{target.path} cannot be read: {error.strerror}")
    if not there:
        near = nearest(target.path.parent, target.factors)
        if near is None:
            return Miss(kind="absent", text="there is no artifact of this checkpoint yet")
        path, found = near
        names = ", ".join(difference.name for difference in found)
        return Miss(kind="changed", text=f"it differs from the nearest, {path.name}, in {names}")
    try:
        artifact = artifacts.open_artifact(target.path)
    except ArtifactError as error:
        return Miss(kind="damaged", text=str(error))
    if artifact.key != target.key:
        found = differences(target.factors, artifact.manifest["factors"])
        names = ", ".join(difference.name for difference in found)
        return Miss(kind="changed", text=f"{target.path} differs in {names}")
    return artifact


def flatten(factors: Any, name: str = "") -> dict[str, str]:
    """Factors as names with dots and plain values; a pass is named by its name."""
    if isinstance(factors, Mapping):
        found: dict[str, str] = {}
        for part, value in factors.items():
            found |= flatten(value, f"{name}.{part}" if name else str(part))
        return found
    if isinstance(factors, Sequence) and not isinstance(factors, str):
        if factors and all(isinstance(item, Mapping) and "name" in item for item in factors):
            order = " ".join(str(item["name"]) for item in factors)
            parts = {item["name"]: {k: v for k, v in item.items() if k != "name"}
                     for item in factors}  # fmt: skip
            return {name: order, **flatten(parts, name)}
        return {name: json.dumps(factors)}
    return {name: str(factors)}


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Difference]:
    """Factors in which two keys differ, by name."""
    left, right = flatten(ours), flatten(theirs)
    return [
        Difference(name=name, ours=left.get(name, ""), theirs=right.get(name, ""))
        for name in sorted(left.keys() | right.keys())
        if left.get(name, "") != right.get(name, "")
    ]


def nearest(folder: Path, factors: Mapping[str, Any]) -> tuple[Path, list[Difference]] | None:
    """The artifact of the same checkpoint with the fewest differences, and these."""
    candidates = []
    for manifest in folder.glob(f"*/{artifacts.MANIFEST}"):
        try:
            theirs = json.loads(manifest.read_text())["factors"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(theirs, dict) and theirs.get("checkpoint") == factors["checkpoint"]:
            candidates.append((manifest.parent, differences(factors, theirs)))
    return min(candidates, key=lambda item: (len(item[1]), item[0].name), default=None)


def open_frozen(path: Path, target: Target) -> Artifact:
    """The artifact at ``path``, if it is whole and made for this model, machine and build.

    Raises:
        ArtifactError: it is not; says in what.
    """
    artifact = artifacts.open_artifact(path)
    found = differences(target.factors, artifact.manifest["factors"])
    grave = [difference for difference in found if difference.name not in TOOLS]
    if grave:
        raise ArtifactError(
            f"{path} was not made for this model, these options and this machine, and --frozen "
            f"compiles nothing ({'; '.join(map(str, grave))}): compile it here, or serve without "
            "--frozen"
        )
    return artifact


def shortened(value: str) -> str:
    """A value as a person reads it: digests cut off."""
    if not value:
        return "nothing"
    return value[:12] if len(value) >= 16 and set(value) <= set("0123456789abcdef") else value


def explain(target: Target, root: Path) -> list[str]:
    """Each factor of the key, whether the artifact is there, and the nearest one, as lines."""
    lines = [f"{name:<31} {shortened(value)}" for name, value in flatten(target.factors).items()]
    lines += ["", f"{'key':<31} {target.key[:32]}", f"{'artifact':<31} {target.path}"]
    found = look_up(target)
    if isinstance(found, Artifact):
        return [*lines, f"{'state':<31} found, {found.nbytes / 2**20:.1f} MiB, whole"]
    lines.append(f"{'state':<31} {found.kind}: {found.text}")
    near = nearest(root / "artifacts", target.factors)
    if near is not None and near[0] != target.path:
        lines += ["", f"nearest: {near[0]}", *(f"  {difference}" for difference in near[1])]
    return lines
