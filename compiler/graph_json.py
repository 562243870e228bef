"""Graphs as JSON, and a small interpreter for them.

An artifact stores its load graph and its regions in this form: readable, without pickle, and
runnable after a bare ``import torch``. Only ops of a few known namespaces are resolved, so a
foreign file cannot name arbitrary code.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fxlm.compiler.errors import ArtifactError

if TYPE_CHECKING:
    from torch import fx

NAMESPACES = ("aten", "fxlm", "prims", "transformers")
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name)
    for name in ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow",
                 "eq", "ne", "lt", "le", "gt", "ge")
}  # fmt: skip
_FUNCTIONS |= {
    "sym_max": torch.sym_max, "sym_min": torch.sym_min, "sym_int": torch.sym_int,
    "sym_float": torch.sym_float, "sym_not": torch.sym_not, "sym_ite": torch.sym_ite,
    "ceil": math.ceil, "floor": math.floor,
}  # fmt: skip


# ---- writing ---------------------------------------------------------------------------------


def dump(graph: fx.Graph) -> list[list[Any]]:
    """The graph as a list of ``["in", name]``, ``["op", name, op, args, kwargs]``, ``["out",
    args]``."""
    lines: list[list[Any]] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            lines.append(["in", node.name])
        elif node.op == "output":
            lines.append(["out", _encode(node.args[0])])
        else:
            kwargs = {key: _encode(value) for key, value in node.kwargs.items()}
            lines.append(["op", node.name, _op_name(node.target), _encode(node.args), kwargs])
    return lines


def _op_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    name = target.__name__
    assert name in _FUNCTIONS, f"{target} cannot be written to an artifact"
    return str(name)


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, slice):
        return {"slice": [_encode(value.start), _encode(value.stop), _encode(value.step)]}
    if type(value).__name__ == "Node":
        return {"node": value.name}
    raise AssertionError(f"{value!r} ({type(value)}) cannot be written to an artifact")


# ---- reading and running ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Value:
    """Place of a value in the interpreter's table."""

    index: int


@dataclass(frozen=True, slots=True)
class _Step:
    target: Callable[..., Any]
    args: Any
    kwargs: Any
    index: int
    release: tuple[int, ...]


class _Table(dict[int, Any]):
    """Values by place; an input is asked for when it is first needed."""

    def __init__(self, read: Callable[[str], Any], inputs: Mapping[int, str]) -> None:
        self._read = read
        self._inputs = inputs

    def fetch(self, value: Any) -> Any:
        if type(value) is _Value:
            if value.index not in self:
                self[value.index] = self._read(self._inputs[value.index])
            return self[value.index]
        if type(value) is list:
            return [self.fetch(item) for item in value]
        return value

    def run(self, step: _Step) -> None:
        kwargs = {key: self.fetch(value) for key, value in step.kwargs.items()}
        self[step.index] = step.target(*self.fetch(step.args), **kwargs)

    def release(self, step: _Step) -> None:
        for index in step.release:
            self.pop(index, None)


class Runner:
    """Interprets one graph; values are dropped after their last use.

    Args:
        lines: what `dump` gave.

    Raises:
        ArtifactError: the lines name an unknown op or value.
    """

    def __init__(self, lines: list[list[Any]]) -> None:
        self.inputs = [line[1] for line in lines if line[0] == "in"]
        self._names = [line[1] for line in lines if line[0] != "out"]
        self._place = {name: i for i, name in enumerate(self._names)}
        self._output = self._decode(next(line[1] for line in lines if line[0] == "out"))
        self._ops = [line for line in lines if line[0] == "op"]
        self._steps = self._plan(_values(self._output))

    def run(
        self,
        read: Mapping[str, Any] | Callable[[str], Any],
        watch: Callable[[str, Any], None] | None = None,
    ) -> list[Any]:
        """Run on inputs by name; each is asked for when it is first needed.

        Args:
            read: inputs.
            watch: called with the name and the value of each call, in order.

        Returns:
            The graph's outputs, in order.
        """
        table = self._table(read)
        for step in self._steps:
            table.run(step)
            if watch is not None:
                watch(self._names[step.index], table[step.index])
            table.release(step)
        result: list[Any] = table.fetch(self._output)
        return result

    def stream(self, read: Callable[[str], Any]) -> Iterator[tuple[int, Any]]:
        """Run, and give each output with its position as soon as it is made; none is held."""
        table = self._table(read)
        positions: dict[int, list[int]] = {}
        for position, value in enumerate(self._output):
            positions.setdefault(value.index, []).append(position)
        for step in self._plan([]):
            table.run(step)
            for position in positions.pop(step.index, []):
                yield position, table[step.index]
            table.release(step)
        for index, places in positions.items():  # inputs that are outputs as they are
            for position in places:
                yield position, table.fetch(_Value(index))

    def _table(self, read: Mapping[str, Any] | Callable[[str], Any]) -> _Table:
        get = read if callable(read) else read.__getitem__
        return _Table(get, {self._place[name]: name for name in self.inputs})

    def _plan(self, outputs: list[int]) -> list[_Step]:
        """What to run, and what to drop after it; ``outputs`` are held to the end."""
        kept = set(outputs)
        steps: list[_Step] = []
        for _, name, op, args, kwargs in reversed(self._ops):
            decoded = self._decode(args), {k: self._decode(v) for k, v in kwargs.items()}
            used = set(_values([decoded[0], list(decoded[1].values())])) | {self._place[name]}
            release = tuple(sorted(used - kept))
            kept |= used
            steps.append(_Step(_resolve(op), *decoded, self._place[name], release))
        return steps[::-1]

    def _decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "node":
            if content not in self._place:
                raise ArtifactError(
                    f"a graph of the artifact uses {content!r}, which is nowhere made"
                )
            return _Value(self._place[content])
        return _decode_plain(kind, content)


def _decode_plain(kind: str, content: Any) -> Any:
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device(content)
    if kind == "slice":
        return slice(*content)
    if kind == "torch":
        value = getattr(torch, content, None)
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return value
    raise ArtifactError(f"a graph of the artifact holds an unknown value {kind}: {content!r}")


def _resolve(name: str) -> Callable[..., Any]:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    parts = name.split(".")
    if len(parts) == 3 and parts[0] in NAMESPACES:
        packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
        overload = getattr(packet, parts[2], None)
        if isinstance(overload, torch._ops.OpOverload):
            return overload
    raise ArtifactError(f"a graph of the artifact calls {name!r}, which this build does not have")


def _values(value: Any) -> list[int]:
    if type(value) is _Value:
        return [value.index]
    if isinstance(value, list):
        return [index for item in value for index in _values(item)]
    return []
