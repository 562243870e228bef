"""What a pass is, for a cache key: the source that it is written in, and the values it stands on.

Its source is its module and every module of the user's that is imported from there, at whatever
depth. Its values are those that no source shows: what its function closes over, its defaults, and
the numbers and texts among its module's globals, which whoever imports the module may set. Not
here: the key (`key`).
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import hashlib
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path, PurePath
from typing import Any

import torch

from fxlm.compiler.errors import PassError

SCALARS = (types.NoneType, bool, int, float, complex, str, bytes)
PLAIN = (*SCALARS, types.EllipsisType, PurePath, re.Pattern, torch.dtype, torch.device)
# Code that a key has by its version, or as `key.source_digest`.
LIBRARIES = {*sys.stdlib_module_names, "fxlm", "numpy", "torch", "transformers", "triton"}
LONGEST = 64  # characters of a value that are shown; a longer one is a digest


def values_of(run: Callable[..., Any]) -> dict[str, str]:
    """The values that a pass's function stands on, by name.

    Raises:
        PassError: one has no text that is the same in every process; names it.
    """
    found: dict[str, str] = {}
    _Values(found).collect(run, "")
    return {name: _short(text) for name, text in sorted(found.items())}


def text_of(value: Any, name: str) -> str:
    """A text that is the same for equal values in every process.

    Raises:
        PassError: there is none for a value of this kind; ``name`` says where it is.
    """
    return _short(_Values({}).text(value, name))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else hashlib.sha256(text.encode()).hexdigest()


class _Values:
    """One walk over a function and what it holds."""

    def __init__(self, found: dict[str, str]) -> None:
        self.found = found
        self.seen: dict[int, int] = {}  # number of each object, by its id

    def collect(self, function: Any, prefix: str) -> None:
        """Add the values of a function, and of those that it calls by a global name."""
        if not isinstance(function, types.FunctionType):
            self.found[f"{prefix}call"] = self.text(function, f"{prefix}call")
            return
        if self.again(function) is not None:
            return
        for name, value in _held(function):
            self.found[prefix + name] = self.text(value, prefix + name)
        for name in sorted(_names(function.__code__)):
            value = function.__globals__.get(name)
            if isinstance(value, types.FunctionType) and _is_users(value.__module__):
                self.collect(value, f"{prefix}{name}.")
            elif name in function.__globals__ and _is_scalar(value) and not name.startswith("__"):
                self.found[prefix + name] = repr(value)

    def text(self, value: Any, name: str) -> str:
        """See `text_of`."""
        if isinstance(value, enum.Enum):
            return f"{type(value).__qualname__}({value.value!r})"
        if isinstance(value, PLAIN):
            return repr(value)
        if isinstance(value, torch.Tensor):
            return f"{value.dtype} {list(value.shape)} {_tensor_digest(value)}"
        if isinstance(value, types.ModuleType):
            return value.__name__
        if isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return str(value)
        number = self.again(value)
        if number is not None:
            return f"object {number}"
        if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
            return self.named(value, name)
        return self.compound(value, name)

    def again(self, value: Any) -> int | None:
        """Number of an object that was met before; else it gets one."""
        number = self.seen.get(id(value))
        self.seen.setdefault(id(value), len(self.seen))
        return number

    def named(self, value: Any, name: str) -> str:
        """A function or a class: its name, and of the user's the code and the values."""
        called = f"{value.__module__}.{value.__qualname__}"
        if not _is_users(value.__module__ or "builtins"):
            return called
        if isinstance(value, type):
            inside = [v for v in vars(value).values() if isinstance(v, types.FunctionType)]
            return f"{called} {[code_text(f.__code__) for f in inside]}"
        inner = _Values({})
        inner.seen = {k: v for k, v in self.seen.items() if k != id(value)}
        inner.collect(value, f"{name}.")
        return f"{called} {code_text(value.__code__)} {inner.found}"

    def compound(self, value: Any, name: str) -> str:
        """A container, or an object by its class and attributes."""
        kind = self.named(type(value), name)
        if isinstance(value, (list, tuple)):
            parts = [self.text(item, f"{name}[{i}]") for i, item in enumerate(value)]
        elif isinstance(value, (set, frozenset)):
            parts = sorted(self.text(item, name) for item in value)
        elif isinstance(value, dict):
            parts = [f"{self.text(k, name)}: {self.text(v, f'{name}[{k!r}]')}"
                     for k, v in value.items()]  # fmt: skip
        elif isinstance(value, functools.partial):
            whole = (value.func, value.args, value.keywords)
            parts = [self.text(part, name) for part in whole]
        elif isinstance(value, types.MethodType):
            parts = [self.text(part, name) for part in (value.__func__, value.__self__)]
        else:
            parts = [f"{k}={self.text(v, f'{name}.{k}')}" for k, v in _attributes(value, name)]
        return f"{kind}({', '.join(parts)})"


def _held(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function closes over, and its defaults, by name."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not bound yet
            continue
    for parameter in inspect.signature(function, follow_wrapped=False).parameters.values():
        if parameter.default is not parameter.empty:
            yield parameter.name, parameter.default


def _attributes(value: Any, name: str) -> list[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    if type(value).__module__ == "builtins" or not hasattr(value, "__dict__"):
        raise PassError(
            f"the value of {name} is a {type(value).__qualname__}, which no cache key can hold: "
            "give a pass numbers, texts, tensors, functions, or lists, tuples, dicts and plain "
            "objects of these"
        )
    return sorted(vars(value).items())


def _is_scalar(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_scalar, value))
    return isinstance(value, SCALARS)


def _names(code: types.CodeType) -> set[str]:
    """Global names in a function and in those within it."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def code_text(code: types.CodeType) -> str:
    """Bytecode and constants, without addresses and line numbers."""
    constants = [code_text(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _tensor_digest(value: torch.Tensor) -> str:
    flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


# ---- source ----------------------------------------------------------------------------------


def source_digest(run: Callable[..., Any]) -> str:
    """SHA-256 over the modules that a pass is written in; of one typed in, over its bytecode."""
    run = _written(run)
    module = inspect.getmodule(run)
    file = getattr(module, "__file__", None)
    if module is None or file is None or not Path(file).is_file():
        code = getattr(run, "__code__", None)
        text = code_text(code) if code is not None else run.__qualname__
        return hashlib.sha256(text.encode()).hexdigest()
    total = hashlib.sha256(Path(file).read_bytes())
    if not module.__name__.startswith("fxlm."):  # else `key.source_digest` has the rest
        for name, content in sorted(_imported(module, Path(file)).items()):
            total.update(f"\0{name}\0".encode() + content)
    return total.hexdigest()


def _written(run: Any) -> Any:
    """The function or class that a callable is made of."""
    while isinstance(run, (functools.partial, types.MethodType)):
        run = run.func if isinstance(run, functools.partial) else run.__func__
    return run if isinstance(run, (type, types.FunctionType)) else type(run)


def _imported(module: types.ModuleType, file: Path) -> dict[str, bytes]:
    """Content of the user's modules that a module imports, and that those import."""
    own = module.__name__.partition(".")[0]
    found = {module.__name__: file.read_bytes()}
    left = [(module.__name__, module.__package__ or "")]
    while left:
        name, package = left.pop()
        for other in _imports(found[name], package):
            spec = None if other in found else _find(other)
            origin = spec.origin if spec is not None and spec.has_location else None
            if spec is None or origin is None or not _is_users(other, origin, own):
                continue
            found[other] = Path(origin).read_bytes()
            is_package = spec.submodule_search_locations is not None
            left.append((other, other if is_package else other.rpartition(".")[0]))
    del found[module.__name__]
    return found


def _imports(content: bytes, package: str) -> Iterator[str]:
    """Names that may be modules, of every import statement of a file."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # a compiled module
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            if node.level and not package:
                continue
            base = importlib.util.resolve_name(base, package or None)
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


def _is_users(name: str, origin: str = "", own: str = "") -> bool:
    """Whether a module is the user's: no library, and installed only if the pass itself is."""
    top = name.partition(".")[0]
    installed = {"site-packages", "dist-packages"} & set(Path(origin).parts)
    return top not in LIBRARIES and (not installed or top == own)


def _find(name: str) -> ModuleSpec | None:
    """Where a module is, without importing it; None if there is none."""
    if name.partition(".")[0] in LIBRARIES:
        return None
    loaded: ModuleSpec | None = getattr(sys.modules.get(name), "__spec__", None)
    if loaded is not None:
        return loaded
    parent = name.rpartition(".")[0]
    above = _find(parent) if parent else None
    if parent and (above is None or above.submodule_search_locations is None):
        return None
    places = above.submodule_search_locations if above is not None else None
    for finder in sys.meta_path:
        spec = finder.find_spec(name, places)
        if spec is not None:
            return spec
    return None
