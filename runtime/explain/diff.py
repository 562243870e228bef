"""Diff: two artifacts against each other, in structure and in numbers.

For a gate on a library upgrade: what went in (versions, options, sources of passes), what came out
(rewrites, graphs, weights), and by how much the log-probabilities of fixture prompts moved. Not
here: printing (`commands`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fxlm.compiler.artifact import Artifact
from fxlm.compiler.errors import InvalidOption
from fxlm.models.checkpoint import Checkpoint
from fxlm.runtime.explain import fixtures
from fxlm.runtime.explain.compare import Errors, compare
from fxlm.runtime.explain.fixtures import Mode
from fxlm.runtime.explain.verify import scores_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One difference: what, and how it is in each artifact (None: absent).

    Attributes:
        given: it is of what the compilation was given, such as a version or an option; else of
            what it made of that.
    """

    what: str
    first: Any
    second: Any
    given: bool = False

    def line(self) -> str:
        """As one line."""
        return f"{self.what}: {_text(self.first)} -> {_text(self.second)}"


def structure(first: Artifact, second: Artifact) -> list[Change]:
    """Every difference of factors, passes, graphs, calls, weights and caches."""
    a, b = first.manifest, second.manifest
    changes = [*_mappings("", _factors(a), _factors(b)), *_options(a["factors"], b["factors"])]
    changes += _passes(a["passes"], b["passes"])
    for name in dict.fromkeys([*a["regions"], *b["regions"]]):
        changes += _region(first, second, name)
    loads = [_ops(artifact, "load.json") for artifact in (first, second)]
    changes += _counts("load graph", *loads)
    for name in ("caches", "results", "model"):
        if a[name] != b[name]:
            changes.append(Change(what=name, first=a[name], second=b[name]))
    sequences = [[call["region"] for call in manifest["calls"]] for manifest in (a, b)]
    if sequences[0] != sequences[1]:
        lengths = [f"{len(s)} calls of {len(set(s))} regions" for s in sequences]
        changes.append(Change(what="step", first=lengths[0], second=lengths[1]))
    return [*changes, *_weights(a["weights"], b["weights"])]


def numbers(first: Artifact, second: Artifact, checkpoint: Checkpoint) -> dict[Mode, Errors]:
    """Errors of the second artifact against the first, on the same inputs, in every mode.

    Raises:
        InvalidOption: an artifact was not made for this checkpoint.
    """
    for artifact in (first, second):
        if artifact.manifest["checkpoint"] != checkpoint.digest():
            reason = f"{artifact.path} was made for another model"
            raise InvalidOption("--model", checkpoint.source, reason)
    model = first.manifest["model"]
    prompts = fixtures.fixture_prompts(
        checkpoint, model["vocab_size"], model["max_position_embeddings"]
    )
    before = scores_of(first, checkpoint, prompts)
    after = scores_of(second, checkpoint, prompts)
    return {mode: compare(after[mode], before[mode]) for mode in before}


def _factors(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Factors of the key by dotted name, passes left out."""
    found: dict[str, Any] = {"compiled": manifest["compiled"]}
    for name, value in manifest["factors"].items():
        if name == "passes":
            continue
        if isinstance(value, dict):
            found.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            found[name] = value
    return found


def _mappings(prefix: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Change]:
    for name in dict.fromkeys([*a, *b]):
        if a.get(name) != b.get(name):
            yield Change(what=prefix + name, first=a.get(name), second=b.get(name), given=True)


def _passes(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> Iterator[Change]:
    """Order, source and number of rewrites of each pass."""
    names = [[line["name"] for line in side] for side in (a, b)]
    if names[0] != names[1]:
        yield Change(what="passes", first=names[0], second=names[1])
    left, right = ({line["name"]: line for line in side} for side in (a, b))
    for name in (n for n in names[0] if n in right):
        for key in ("source", "rewrites"):
            if left[name][key] != right[name][key]:
                yield Change(
                    what=f"pass {name}, {key}", first=left[name][key], second=right[name][key],
                    given=key == "source",
                )  # fmt: skip


def _options(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Change]:
    left, right = ({p["name"]: p["options"] for p in side["passes"]} for side in (a, b))
    for name in (n for n in left if n in right):
        yield from _mappings(f"pass {name}, option ", left[name], right[name])


def _region(first: Artifact, second: Artifact, name: str) -> Iterator[Change]:
    a, b = (artifact.manifest["regions"].get(name) for artifact in (first, second))
    if a is None or b is None:
        yield Change(what=f"region {name}", first=a, second=b)
    elif a != b:
        left, right = (_ops(artifact, f"regions/{name}.json") for artifact in (first, second))
        changes = list(_counts(f"region {name}", left, right))
        same = Change(what=f"region {name}, graph of the same ops", first=a, second=b)
        yield from changes or [same]


def _ops(artifact: Artifact, file: str) -> Counter[str]:
    content = artifact.read_json(file)
    lines = content["graph"] if isinstance(content, dict) else content
    return Counter(line[2] for line in lines if line[0] == "op")


def _counts(where: str, a: Counter[str], b: Counter[str]) -> Iterator[Change]:
    for name in sorted(set(a) | set(b)):
        if a[name] != b[name]:
            yield Change(what=f"{where}, calls of {name}", first=a[name], second=b[name])


def _weights(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Change]:
    """How many there are of each layout; their names count up and tell nothing of what they are."""
    left, right = (Counter(map(_layout, side.values())) for side in (a, b))
    for layout in dict.fromkeys([*left, *right]):
        if left[layout] != right[layout]:
            what = f"weights, {layout}"
            yield Change(what=what, first=left[layout], second=right[layout])


def _layout(weight: Mapping[str, Any]) -> str:
    return f"{weight['dtype']} {weight['shape']} of strides {weight['stride']}"


def _text(value: Any) -> str:
    """Digests by their beginning."""
    if value is None:
        return "absent"
    text = str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text[:300]
