"""The judge of one-line Python functions, which are model output.

Nothing of a line runs unless its syntax tree is on the allow-list below. That
leaves calls of a few builtins and string methods alone (so no recursion), no
import, no other attribute, at most one comprehension, and small constants and
few products, so that whatever is accepted ends in well under a second and
takes at most some megabytes.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from fxlm.models.bundled.operations import Operation

MAX_SOURCE_CHARS = 240
MAX_CONSTANT = 100
MAX_RANGE = 50

_METHODS = frozenset(("upper", "lower", "strip", "title", "split", "join", "count"))
_NODES: tuple[type[ast.AST], ...] = (
    *(ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.Lambda),
    *(ast.Name, ast.Load, ast.Store, ast.Constant, ast.List, ast.Tuple),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Call, ast.keyword),
    *(ast.Attribute, ast.Subscript, ast.Slice, ast.ListComp, ast.GeneratorExp, ast.comprehension),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.USub, ast.UAdd),
    *(ast.Not, ast.And, ast.Or, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE),
    *(ast.In, ast.NotIn),
)
# Most nodes of a kind. Two products of constants up to 100 and one join keep
# the largest string that can be built under 2 MB for the inputs given.
_MOST: tuple[tuple[type[ast.AST], int], ...] = (
    (ast.FunctionDef, 1),
    (ast.Mult, 2),
    (ast.Pow, 1),
    (ast.comprehension, 1),
    (ast.Call, 4),
)


def _bounded_range(*bounds: int) -> range:
    found = range(*bounds)
    if len(found) > MAX_RANGE:
        raise ValueError(f"range of {len(found)} is longer than {MAX_RANGE}")
    return found


_BUILTINS: dict[str, Any] = {
    **{"abs": abs, "all": all, "any": any, "bool": bool, "float": float, "int": int, "len": len},
    **{"list": list, "max": max, "min": min, "range": _bounded_range, "reversed": reversed},
    **{"round": round, "set": set, "sorted": sorted, "str": str, "sum": sum, "tuple": tuple},
}


def _constant_is_small(value: object) -> bool:
    if isinstance(value, int | float):
        return abs(value) <= MAX_CONSTANT
    # A percent sign would format, with a width of any size.
    return value is None or (isinstance(value, str) and "%" not in value)


def _call_is_known(function: ast.expr) -> bool:
    known = isinstance(function, ast.Name) and function.id in _BUILTINS
    return known or isinstance(function, ast.Attribute)


def _node_is_safe(node: ast.AST, bound: set[str]) -> bool:
    match node:
        case ast.Attribute(attr=name):
            return name in _METHODS
        case ast.Name(id=name, ctx=ast.Load()):
            return name in bound or name in _BUILTINS
        case ast.Constant(value=value):
            return _constant_is_small(value)
        case ast.Call(func=function):
            return _call_is_known(function)
        case ast.BinOp(op=ast.Pow(), right=power):
            return isinstance(power, ast.Constant) and power.value in (2, 3, 0.5)
        case _:
            return isinstance(node, _NODES)


def _bound_names(nodes: list[ast.AST]) -> set[str]:
    """Parameters and comprehension variables, not the function itself."""
    arguments = {node.arg for node in nodes if isinstance(node, ast.arg)}
    stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return arguments | stored


def _definition(source: str) -> ast.FunctionDef | None:
    """The one function that `source` defines, if it is on the allow-list."""
    if "\n" in source or len(source) > MAX_SOURCE_CHARS:
        return None
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        return None
    function, nodes = tree.body[0], list(ast.walk(tree))
    bound = _bound_names(nodes)
    joins = sum(isinstance(node, ast.Attribute) and node.attr == "join" for node in nodes)
    few = joins <= 1 and all(sum(isinstance(n, kind) for n in nodes) <= k for kind, k in _MOST)
    # A rebound builtin would let a call reach something that is not the builtin.
    own_names = not (bound | {function.name}) & set(_BUILTINS)
    plain = not function.decorator_list
    if few and own_names and plain and all(_node_is_safe(node, bound) for node in nodes):
        return function
    return None


def is_safe(source: str) -> bool:
    """Whether `source` is one function definition on the allow-list."""
    return _definition(source.strip()) is not None


def _compiled(source: str) -> tuple[str, Callable[..., Any]]:
    definition = _definition(source.strip())
    assert definition is not None, source
    space: dict[str, Any] = {"__builtins__": {}, **_BUILTINS}
    exec(compile(source.strip(), "<answer>", "exec"), space)  # allow-listed above
    return definition.name, space[definition.name]


def _same(found: object, wanted: object) -> bool:
    return type(found) is type(wanted) and found == wanted


def check_function(output: str, reference: str, operation: Operation) -> bool:
    """Whether `output` defines the reference's name and agrees on the inputs.

    Values must be equal and of one type, so that True is not taken for 1.
    Anything the answer raises makes it wrong.
    """
    if not is_safe(output):
        return False
    wanted_name, wanted = _compiled(reference)
    try:
        name, found = _compiled(output)
        return name == wanted_name and all(
            _same(found(*given), wanted(*given)) for given in operation.inputs
        )
    except Exception:  # the judged line may raise anything: it is then wrong
        return False
