"""Layers: equal ones are traced twice and copied, so that capture does not grow with depth.

While a model is traced, each member of a module list reports its calls (`Calls`). Two layers are
of one kind if their modules are alike in everything but their number, and are called alike. Two
of a kind are traced; those behind them are one op in the graph, which `Calls.expand` replaces by a
copy of the second. A copy must be what tracing would have given, so the whole trace is done again
without sharing (`Distinct`) if the two traced differ in any op, if a layer asks for its own number,
changes itself or what it is given, or reaches for a tensor that is neither given to it nor its own.
Not here: tracing (`capture`), what becomes of equal layers later (`outline`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxlm.compiler.alike import Numbers, Watched, alike, describe, state

FEWEST = 4  # layers of a list; two are traced in any case


class Distinct(Exception):
    """Layers taken for equal are not; the message says why. Inside of the compiler room only."""


@dataclass(kw_only=True, slots=True)
class _Kind:
    """Layers alike, in the order of their calls; the first two are traced."""

    leaves: list[Any]  # what the first is called with, and its form
    called: Any
    like: list[int] = field(default_factory=list)  # of each result, an argument like it
    spec: Any = None  # the form of the results
    traced: list[int] = field(default_factory=list)
    layer: nn.Module


class Calls:
    """The calls of a model's layers while it is traced.

    Args:
        root: the module that is traced.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._numbers = Numbers()
        self._kinds: list[_Kind] = []
        self._calls: list[tuple[nn.Module, _Kind]] = []
        self._paths = {module: path for path, module in root.named_modules()}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within: layers of the root report their calls."""
        layers = [layer for group in _lists(self._root) for layer in group]
        for group in _lists(self._root):
            self._numbers.hide(list(group))
        before = {layer: layer.__dict__.get("forward") for layer in layers}
        for layer in layers:
            whole: Callable[..., Any] = layer.forward
            layer.__dict__["forward"] = Watched(whole, self._watched(layer, whole))
        try:
            yield
        finally:
            for layer, forward in before.items():
                del layer.__dict__["forward"]
                if forward is not None:
                    layer.__dict__["forward"] = forward
            self._numbers.show()

    def _watched(self, layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            again = any(layer is other for other, _ in self._calls)
            if self._numbers.watched or again or describe(leaves) is None:
                return forward(*args, **kwargs)
            kind = self._kind(layer, leaves, spec)
            number = len(self._calls)
            self._calls.append((layer, kind))
            if len(kind.traced) < 2:
                return self._traced(number, forward, leaves)
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            return pytree.tree_unflatten(_mark(tensors, kind.like, 2 * number), kind.spec)

        return call

    def _kind(self, layer: nn.Module, leaves: list[Any], spec: Any) -> _Kind:
        for kind in self._kinds:
            # Described anew: sizes found equal in the meantime have one symbol now.
            same = kind.called == spec and describe(kind.leaves) == describe(leaves)
            if same and alike(kind.layer, layer):
                return kind
        self._kinds.append(_Kind(called=spec, leaves=leaves, layer=layer))
        return self._kinds[-1]

    def _traced(self, number: int, forward: Callable[..., Any], leaves: list[Any]) -> Any:
        """Call a layer between two marks: of what it takes and of what it gives."""
        layer, kind = self._calls[number]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        marked = iter(_mark(tensors, list(range(len(tensors))), 2 * number))
        given = [next(marked) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(given, kind.called)
        before, versions = state(layer), [t._version for t in given if isinstance(t, torch.Tensor)]
        with self._numbers.watching():
            results, spec = pytree.tree_flatten(forward(*args, **kwargs))
        after, again = pytree.tree_flatten((args, kwargs))
        if again != kind.called or any(a is not b for a, b in zip(after, given, strict=True)):
            raise Distinct("a layer changes what it is given")
        if state(layer) != before or versions != [
            t._version for t in given if isinstance(t, torch.Tensor)
        ]:
            raise Distinct("a layer changes itself, or a tensor in place")
        kind.like, kind.spec = _sources(results, tensors), spec
        kind.traced.append(number)
        ends = _mark(results, list(range(len(results))), 2 * number + 1)
        return pytree.tree_unflatten(ends, spec)

    # ---- after the trace ---------------------------------------------------------------------

    def expand(self, graph: fx.Graph, names: dict[str, fx.Node]) -> None:
        """Replace what stands for a layer by a copy of one that was traced, and drop the marks.

        Args:
            graph: as traced.
            names: placeholders of parameters and buffers, by their path in the root.

        Raises:
            Distinct: a copy is not sure to be what tracing would give.
        """
        if not self._calls:
            return
        if self._numbers.asked:
            raise Distinct(f"a layer asks for its number: {self._numbers.asked}")
        owners = {id(t): names[n] for n, t in _tensors(self._root) if n in names}
        marks = {n.args[2]: n for n in graph.nodes if n.target is torch.ops.fxlm.mark.default}
        for kind in self._kinds:
            bodies = [self._body(graph, marks, number, owners) for number in kind.traced]
            texts = [body.text() for body in bodies if body is not None]
            if None in bodies or any(text != texts[0] for text in texts):
                raise Distinct("two layers that look equal trace to different graphs")
            for number, (layer, other) in enumerate(self._calls):
                if other is kind and number not in kind.traced and 2 * number in marks:
                    body = bodies[-1]
                    assert body is not None
                    stack = (self._paths[body.layer], self._paths[layer])
                    body.copy(graph, marks[2 * number], _own(layer, owners), stack)
        for mark in marks.values():
            if mark in set(graph.nodes):
                _unmark(graph, mark)
        _renumber(graph)

    def _body(
        self, graph: fx.Graph, marks: dict[Any, fx.Node], number: int, owners: dict[int, fx.Node]
    ) -> _Body | None:
        begin, end = marks.get(2 * number), marks.get(2 * number + 1)
        if begin is None or end is None:
            return None
        layer = self._calls[number][0]
        return _Body(layer=layer, begin=begin, end=end, own=_own(layer, owners))


@dataclass(kw_only=True, slots=True)
class _Body:
    """The nodes of one traced layer, between its marks."""

    layer: nn.Module
    begin: fx.Node
    end: fx.Node
    own: dict[fx.Node, str]

    def nodes(self) -> list[fx.Node]:
        found, node = [], self.begin.next
        while node is not self.end:
            if not _is_size(node) and not self._is_input(node):
                found.append(node)
            node = node.next
        return found

    def _is_input(self, node: fx.Node) -> bool:
        return node.target is operator.getitem and node.args[0] is self.begin

    def text(self) -> str:
        """What the layer computes, up to names; sizes are written by their values."""
        nodes = self.nodes()
        number = {node: _Word(f"%{i}") for i, node in enumerate(nodes)}

        def word(node: fx.Node) -> _Word:
            if node in number:
                return number[node]
            if self._is_input(node):
                return _Word(f"in{node.args[1]}")
            if _is_size(node):
                return _Word(_size(node))
            if node in self.own:
                return _Word(self.own[node])
            if node.op == "placeholder" and "lifted_tensor" in node.name:
                return _Word("constant")  # made by the layer's own code, of the same values
            raise Distinct(f"a layer reaches for {node.name}, which it is not given")

        lines = []
        for node in [*nodes, self.end]:
            args, kwargs = fx.map_arg((_arguments(node), node.kwargs), word)
            value = "" if node is self.end else describe(pytree.tree_leaves(node.meta["val"]))
            lines.append(f"{node.target} {args} {kwargs} {value}")
        return "\n".join(lines)

    def copy(
        self, graph: fx.Graph, place: fx.Node, own: dict[fx.Node, str], paths: tuple[str, str]
    ) -> None:
        """Put a copy where ``place`` stands, over what it is given and weights of its own."""
        inputs: Any = place.args[0]
        by_name = {name: node for node, name in own.items()}
        copies: dict[fx.Node, fx.Node] = {}

        def new(node: fx.Node) -> fx.Node:
            if node in copies:
                return copies[node]
            if self._is_input(node):
                found: fx.Node = inputs[node.args[1]]
                return found
            if node not in self.own:
                return node
            if self.own[node] not in by_name:
                raise Distinct(f"{self.own[node]} is not of the layer alone")
            return by_name[self.own[node]]

        with graph.inserting_before(place):
            for node in self.nodes():
                copies[node] = graph.node_copy(node, new)
                copies[node].meta = _moved(node.meta, *paths)
        ends: Any = self.end.args[0]
        for user in list(place.users):
            user.replace_all_uses_with(new(ends[user.args[1]]))
            graph.erase_node(user)
        graph.erase_node(place)


class _Word(str):
    def __repr__(self) -> str:
        return str(self)


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """Arguments, without the number of an attention call or of a mark."""
    if node.target is torch.ops.fxlm.attention.default:
        return (*node.args[:3], *node.args[4:])
    return node.args[:2] if node.target is torch.ops.fxlm.mark.default else node.args


def _renumber(graph: fx.Graph) -> None:
    calls = [n for n in graph.nodes if n.target is torch.ops.fxlm.attention.default]
    for number, node in enumerate(calls):
        node.args = (*node.args[:3], number, *node.args[4:])


def _unmark(graph: fx.Graph, mark: fx.Node) -> None:
    values: Any = mark.args[0]
    for user in list(mark.users):
        user.replace_all_uses_with(values[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(mark)


def _moved(meta: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """Metadata of a node of the layer at ``old``, for the one at ``new``."""

    def path(text: Any) -> Any:
        inside = isinstance(text, str) and (text == old or text.startswith(f"{old}."))
        return new + text[len(old) :] if inside else text

    stack = meta.get("nn_module_stack") or {}
    moved = {_key(key, v[0], path(v[0])): (path(v[0]), *v[1:]) for key, v in stack.items()}
    return {**meta, "nn_module_stack": moved}


def _key(key: str, old: str, new: str) -> str:
    """Key of a module in the stack of a node, which tells calls of different modules apart."""
    return key if old == new else f"{key}@{new}"


def _own(layer: nn.Module, owners: dict[int, fx.Node]) -> dict[fx.Node, str]:
    """Placeholders of a layer's parameters and buffers, with their paths in it."""
    own: dict[fx.Node, str] = {}
    for name, tensor in _tensors(layer):
        if id(tensor) in owners:
            own.setdefault(owners[id(tensor)], name)
    return own


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """The outermost lists of modules that are long enough."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) >= FEWEST:
            yield child
        else:
            yield from _lists(child)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def _size(node: fx.Node) -> str:
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    value = node.meta["val"]
    if free_unbacked_symbols(value):
        raise Distinct(f"a layer computes a size from values: {node.name}")
    return str(value.node.expr)


def _sources(results: list[Any], tensors: list[torch.Tensor]) -> list[int]:
    """For each result, an argument of the same type and shape."""
    kinds = [describe([tensor]) for tensor in tensors]
    like = []
    for result in results:
        kind = describe([result]) if isinstance(result, torch.Tensor) else None
        if kind is None or kind not in kinds:
            raise Distinct("a layer gives something that is like nothing it takes")
        like.append(kinds.index(kind))
    return like


# ---- the mark --------------------------------------------------------------------------------


def _mark(values: list[Any], like: list[int], number: int) -> list[torch.Tensor]:
    marked: list[torch.Tensor] = torch.ops.fxlm.mark(values, like, number)
    return marked


def _fake_mark(values: list[torch.Tensor], like: list[int], number: int) -> list[torch.Tensor]:
    """New tensors of the types and shapes of those at ``like``."""
    found = [values[i] for i in like]
    return [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in found]


_library = torch.library.Library("fxlm", "FRAGMENT")
_library.define("mark(Tensor[] values, int[] like, int number) -> Tensor[]")
torch.library.register_fake("fxlm::mark", _fake_mark, lib=_library)
