"""Alike: whether two modules differ in nothing but their number in a list.

Compared are classes, parameters and buffers by type and shape, and every other attribute by value,
all the way down. What is no plain value must be the same object. Whole numbers that differ as the
numbers of the modules do are taken for those numbers, and hidden while the modules run (`Numbers`):
whoever asks for one is found out. Not here: what is made of it (`layers`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)


class Numbers:
    """Hides the numbers that modules of lists have as attributes.

    Attributes:
        asked: name of a number that was asked for within `watching`; empty if none was.
        watched: whether that is now.
    """

    def __init__(self) -> None:
        self.asked = ""
        self.watched = False
        self._hidden: list[tuple[dict[str, Any], str, int]] = []

    def hide(self, members: Sequence[nn.Module]) -> None:
        """Put something that notices its use in the place of each member's number."""
        found = [list(_numbers(member)) for member in members]
        for at, numbers in enumerate(found):
            other = 1 if at == 0 else 0
            there = {(path, name): value for path, name, _, value in found[other]}
            for path, name, table, value in numbers:
                if there.get((path, name), value) - other == value - at:
                    self._hidden.append((table, name, value))
                    table[name] = _Number(value, name, at, self)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within: a question for a number is noticed."""
        self.watched = True
        try:
            yield
        finally:
            self.watched = False

    def ask(self, name: str) -> None:
        """A number of this name is asked for."""
        if self.watched:
            self.asked = name

    def show(self) -> None:
        """Put the numbers back."""
        for table, name, value in self._hidden:
            table[name] = value
        self._hidden.clear()


def _numbers(module: nn.Module) -> Any:
    for path, part in module.named_modules():
        for name, value in part.__dict__.items():
            if type(value) is int:
                yield path, name, part.__dict__, value


@dataclasses.dataclass(frozen=True, slots=True)
class Watched:
    """A module's forward, and what is called in its stead."""

    forward: Callable[..., Any]
    call: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


class _Number:
    """A number that is not to be looked at."""

    def __init__(self, value: int, name: str, at: int, numbers: Numbers) -> None:
        self.__dict__.update(value=value, name=name, base=value - at, numbers=numbers)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        self.numbers.ask(self.name)
        return int

    def __getattr__(self, name: str) -> Any:
        self.numbers.ask(self.name)
        return getattr(self.value, name)


def _asking(name: str) -> Any:
    def ask(self: Any, *args: Any) -> Any:
        self.numbers.ask(self.name)
        others = [a.value if type(a) is _Number else a for a in args]
        return getattr(self.value, name)(*others)

    return ask


_OWN = {
    "__class__", "__new__", "__init__", "__getattribute__", "__setattr__", "__delattr__",
    "__init_subclass__", "__subclasshook__", "__reduce__", "__reduce_ex__",
}  # fmt: skip
for _name in set(dir(int)) - _OWN:
    if _name.startswith("__") and callable(getattr(int, _name)):
        setattr(_Number, _name, _asking(_name))


def alike(left: Any, right: Any) -> bool:
    """Whether two values are equal, modules up to the numbers that `Numbers` hides."""
    return _alike(left, right, set())


def _alike(left: Any, right: Any, open_: set[tuple[int, int]]) -> bool:
    """As `alike`; pairs whose comparison is under way are taken for equal."""
    if type(left) is not type(right):
        return False
    if type(left) is _Number:
        return bool(left.base == right.base)
    if left is right or (id(left), id(right)) in open_:
        return True
    open_.add((id(left), id(right)))
    if isinstance(left, torch.Tensor):
        return describe([left]) == describe([right])
    if isinstance(left, (*_PLAIN, set, frozenset)):
        return bool(left == right)
    if isinstance(left, dict):
        return list(left) == list(right) and _all(left.values(), right.values(), open_)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and _all(left, right, open_)
    return _all(_parts(left), _parts(right), open_)


def _all(left: Iterable[Any], right: Iterable[Any], open_: set[tuple[int, int]]) -> bool:
    return all(_alike(a, b, open_) for a, b in zip(left, right, strict=True))


def _parts(value: Any) -> tuple[Any, ...]:
    """What makes a value; of what is not known, the object itself."""
    if isinstance(value, nn.Module):
        return (value.__dict__,)
    if isinstance(value, types.MethodType):
        return (id(value.__func__), value.__self__)
    if isinstance(value, functools.partial):
        return (id(value.func), value.args, value.keywords)
    if isinstance(value, Watched):
        return (value.forward,)
    return (id(value),)


def state(module: nn.Module) -> list[tuple[str, str, int]]:
    """What the attributes of a module and its parts are, to notice that one was changed."""
    return [
        (path, name, id(value))
        for path, part in module.named_modules()
        for table in (part.__dict__, part._buffers, part._parameters)
        for name, value in table.items()
    ]


def describe(leaves: Sequence[Any]) -> tuple[Any, ...] | None:
    """Values as what can be compared, tensors by type and shape; None if one cannot be."""
    words: list[Any] = []
    seen: dict[int, int] = {}
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            words.append((seen.setdefault(id(leaf), len(seen)), *_typed(leaf)))
        elif isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            words.append(str(leaf.node.expr))
        elif isinstance(leaf, _PLAIN) or _is_frozen(leaf):
            words.append((type(leaf), leaf))
        else:
            return None
    return tuple(words)


def _typed(tensor: torch.Tensor) -> tuple[Any, ...]:
    sizes = [str(size) for size in (*tensor.shape, *tensor.stride())]
    return tensor.dtype, tensor.device, *sizes


def _is_frozen(value: Any) -> bool:
    parameters: Any = getattr(value, "__dataclass_params__", None)
    return parameters is not None and bool(parameters.frozen)
