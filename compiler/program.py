"""Program: one FX graph, what its inputs mean, and what was done to it.

Passes see this class and nothing else. Here: the graph with typed inputs, insertion helpers
that keep metadata, and queries (layers, linears, attention nodes). Not here: how a graph is
captured (`capture`), rewritten in order (`pipeline`), cut (`hoist`, `outline`) or compiled
(`lower`).
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx

from fxlm.compiler.errors import PassError
from fxlm.compiler.ops.kv_cache import scale_columns
from fxlm.compiler.report import PassReport
from fxlm.compiler.values import Known, evaluate, is_effect

if TYPE_CHECKING:  # symbolic shapes take half a second to import, and serving needs none
    from torch._subclasses.fake_tensor import FakeTensorMode

Role = Literal["step", "weight", "constant", "cache"]
Stage = Literal["captured", "bound", "paged", "final", "verified", "piece"]

INT64_MAX = 2**63 - 1
MAX_TOKENS = 1 << 20  # of a step, unless the model itself takes fewer


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A slice of a tensor: ``length`` indices of dimension ``dim`` from ``start``."""

    dim: int
    start: int
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """What one placeholder of the graph stands for.

    Attributes:
        role: ``step`` (given anew at each step), ``weight`` (a tensor of the checkpoint),
            ``constant`` (a small tensor computed from the config, kept in the artifact),
            ``cache`` (KV memory, written in place).
        source: name of the step input, of the checkpoint tensor, of the buffer, or
            ``k``/``v`` of a cache.
        layer: index of the attention layer, for caches.
        part: of a weight, if no more of the checkpoint tensor is read than a slice.
    """

    role: Role
    source: str
    layer: int = -1
    part: Part | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSpec:
    """KV memory of one attention layer: heads and head sizes per token, and the dtype.

    Where the dtype is one of codes, each token and head has a float32 scale beside them.
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V for one token of one layer."""
        columns = self.columns(self.key_dim) + self.columns(self.value_dim)
        return self.num_kv_heads * columns * self.dtype.itemsize

    def columns(self, dim: int) -> int:
        """The last dimension of a cache whose heads have size ``dim``."""
        return dim + scale_columns(self.dtype)


# Of a tensor in the checkpoint: name, type, shape.
Raw = tuple[str, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What passes may know of the model; filled from its config, never from its name.

    ``kv_scales`` has, by layer, the tensors of the checkpoint that hold the scale to store keys
    with, and that of values.
    """

    model_type: str
    vocab_size: int
    max_position_embeddings: int
    num_layers: int
    dtype: torch.dtype
    device: torch.device
    block_size: int = 16
    max_logprobs: int = 20
    kv_scales: Mapping[int, tuple[Raw, Raw]] = field(default_factory=dict)


@dataclass(kw_only=True)
class Program:
    """A captured model on its way to a compiled step.

    Attributes:
        module: graph whose placeholders are all inputs (weights too), in any order.
        inputs: meaning of each placeholder, by node name.
        constants: values of the ``constant`` inputs, by source name.
        facts: see `Facts`.
        fake_mode: the mode in which every ``node.meta["val"]`` lives.
        stage: how far the program has come; `contract` has the law of each stage.
        caches: KV memory per attention layer, once paged.
        log: one report a pass.
        misses: near misses of the running pass, shown when it fires too seldom.
        notes: what the running pass decided, a line each; its report keeps them.
        symbols: sizes that change from step to step, by name.
        max_tokens: most tokens of a step that the graph takes.
        taps: names of the values returned behind the results proper; see `tap`.
        steered: points at which requests may add a vector, in order, and their hidden sizes.
        known: values of calls alike; see `values`.
    """

    module: fx.GraphModule
    inputs: dict[str, Input]
    constants: dict[str, torch.Tensor]
    facts: Facts
    fake_mode: FakeTensorMode
    stage: Stage = "captured"
    caches: list[CacheSpec] = field(default_factory=list)
    log: list[PassReport] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    symbols: dict[str, torch.SymInt] = field(default_factory=dict)
    max_tokens: int = MAX_TOKENS
    taps: list[str] = field(default_factory=list)
    steered: dict[str, int] = field(default_factory=dict)
    known: Known = field(default_factory=dict, repr=False)

    @property
    def graph(self) -> fx.Graph:
        """The FX graph; mutate it in place."""
        return self.module.graph

    def copy(self) -> Program:
        """A program with a graph and books of its own; fake values are shared."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = dict(node.meta)
        books: dict[str, Any] = {
            f.name: type(value)(value)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), (dict, list))
        }
        return replace(self, module=fx.GraphModule(torch.nn.Module(), graph), **books)

    # ---- building ------------------------------------------------------------------------

    def call(self, target: Any, *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
        """Insert a call at the graph's insertion point, with metadata.

        Args:
            target: an op, e.g. ``torch.ops.aten.cat.default``.
            args, kwargs: nodes and constants.
            like: node whose module path the new node takes over.

        Returns:
            The new node; ``meta["val"]`` holds its fake value.
        """
        node = self.graph.call_function(target, args, kwargs)
        node.meta["nn_module_stack"] = like.meta.get("nn_module_stack")
        node.meta["stack_trace"] = like.meta.get("stack_trace")
        evaluate(node, self.known, self._evaluating)
        return node

    def add_input(self, name: str, spec: Input, value: torch.Tensor) -> fx.Node:
        """Add a placeholder after the existing ones; ``value`` is its fake tensor."""
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        node.meta["val"] = value
        self.inputs[node.name] = spec
        return node

    def step_input(self, name: str, shape: Sequence[int | str], dtype: torch.dtype) -> fx.Node:
        """The placeholder of a step input; made when it does not exist yet.

        Args:
            name: see ``docs/architecture.md`` for the list of step inputs.
            shape: sizes; a string is a size that changes from step to step.
            dtype: element type.
        """
        for node in self.placeholders("step"):
            if self.inputs[node.name].source == name:
                return node
        value = self.fake_tensor(shape, dtype)
        return self.add_input(name, Input(role="step", source=name), value)

    def fake_tensor(self, shape: Sequence[int | str], dtype: torch.dtype) -> torch.Tensor:
        """A fake tensor on the program's device; a string is a size by name, e.g. ``T``."""
        sizes = [s if isinstance(s, int) else self.symbol(s) for s in shape]
        with self.fake_mode:
            return torch.empty(sizes, dtype=dtype, device=self.facts.device)

    def symbol(self, name: str) -> torch.SymInt:
        """The size of this name, the same in every input; ``T`` is the number of tokens."""
        from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

        if name not in self.symbols:
            if name == "T":
                size = self.find_step_input("input_ids").meta["val"].shape[1]
            else:
                # The hint is arbitrary, but > 1, so that nothing is specialised to 0 or 1.
                real = torch.empty(5 + 2 * len(self.symbols), device="meta")
                dynamic = [DimDynamic.DYNAMIC]
                context: Any = StatelessSymbolicContext(dynamic_sizes=dynamic)
                size = self.fake_mode.from_tensor(real, symbolic_context=context).shape[0]
            self.symbols[name] = size
        return self.symbols[name]

    def miss(self, node: fx.Node, reason: str) -> None:
        """Record that ``node`` nearly matched the running pass, and why it did not."""
        self.misses.append(f"{node.name} ({node.target}, {module_path(node)}): {reason}")

    def note(self, text: str) -> None:
        """Record what the running pass decided, for its report."""
        self.notes.append(text)

    def eliminate_dead_code(self) -> None:
        """Erase calls that nobody uses and that have no effect, then unused weights."""
        for node in reversed(list(self.graph.nodes)):
            if node.op == "call_function" and not node.users and not is_effect(node):
                self.graph.erase_node(node)
        for node in self.placeholders():
            if not node.users and self.inputs[node.name].role in ("weight", "constant"):
                self.graph.erase_node(node)
                spec = self.inputs.pop(node.name)
                if spec.role == "constant":
                    self.constants.pop(spec.source, None)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every user of ``old`` use ``new``, and erase ``old``."""
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    # ---- asking --------------------------------------------------------------------------

    def placeholders(self, role: Role | None = None) -> list[fx.Node]:
        """Placeholders in order, all or those of one role."""
        nodes = [n for n in self.graph.nodes if n.op == "placeholder"]
        return [n for n in nodes if role is None or self.inputs[n.name].role == role]

    def find(self, *targets: Any) -> list[fx.Node]:
        """Calls of any of the given ops, in graph order."""
        return [n for n in self.graph.nodes if n.op == "call_function" and n.target in targets]

    def linears(self, pattern: str = "") -> list[fx.Node]:
        """``aten.linear`` calls whose module path matches the regular expression."""
        found = self.find(torch.ops.aten.linear.default)
        return [n for n in found if re.search(pattern, module_path(n))]

    def attentions(self) -> list[fx.Node]:
        """Attention calls, before or after paging, in graph order."""
        ops = torch.ops.fxlm
        return self.find(ops.attention.default, ops.paged_attention.default)

    def weight_only(self) -> set[fx.Node]:
        """Nodes that depend on weights and constants alone (placeholders included)."""
        known: set[fx.Node] = set(self.placeholders("weight") + self.placeholders("constant"))
        for node in self.graph.nodes:
            inputs = node.all_input_nodes
            if node.op != "call_function" or not inputs or is_effect(node):
                continue
            if all(i in known for i in inputs):
                known.add(node)
        return known

    def output(self) -> fx.Node:
        """The output node."""
        node: fx.Node = next(iter(reversed(self.graph.nodes)))
        return node

    def logits(self) -> fx.Node:
        """The single value that the graph returns before tokens are drawn in it."""
        (node,) = self.results()
        return node

    def results(self) -> list[fx.Node]:
        """What the graph returns, taps left out."""
        returned: Any = self.output().args[0]
        return list(returned[: len(returned) - len(self.taps)])

    def set_results(self, nodes: Sequence[fx.Node]) -> None:
        """Return these instead of what is returned now; taps stay."""
        returned: Any = self.output().args[0]
        taps = returned[len(returned) - len(self.taps) :]
        self.output().args = ((*nodes, *taps),)

    def tap(self, name: str, node: fx.Node) -> None:
        """Return a value of each token to the requests that ask for it by this name.

        Args:
            name: what requests call it; a name in use is an error.
            node: [1,T,...] or [T,...] with T the tokens of the step.

        Raises:
            PassError: no size of a token's own, or the name is taken.
        """
        value: Any = node.meta["val"]
        tokens = self.symbol("T")
        if name in self.taps:
            raise PassError(f"a tap named {name!r} exists already")
        with self.graph.inserting_before(self.output()):
            if value.dim() > 1 and value.shape[0] == 1 and value.shape[1] == tokens:
                node = self.call(torch.ops.aten.select.int, node, 0, 0, like=node)
            elif value.dim() < 1 or value.shape[0] != tokens:
                raise PassError(
                    f"tap {name!r} is {list(value.shape)}; it must begin with the tokens, [1,T,...]"
                )
        returned: Any = self.output().args[0]
        self.output().args = ((*returned, node),)
        self.taps.append(name)

    def find_step_input(self, name: str) -> fx.Node:
        """The placeholder of an existing step input."""
        for node in self.placeholders("step"):
            if self.inputs[node.name].source == name:
                return node
        raise AssertionError(f"no step input {name!r}")

    def propagate(self, since: fx.Node | None = None) -> None:
        """Compute ``meta["val"]`` of calls anew, of all or of those behind the node ``since``.

        A call whose arguments have the values that it was computed from keeps what it has.
        """
        nodes: Iterable[fx.Node] = self.graph.nodes
        if since is not None:
            nodes = itertools.dropwhile(lambda node: node is not since, nodes)
        for node in nodes:
            if node.op == "call_function":
                evaluate(node, self.known, self._evaluating)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Within: ops are evaluated on fake tensors, composite ones by their Python form.

        In torch 2.11 the C++ form of ``linear`` cannot be called on sizes that are symbols.
        """
        from torch._dispatch.python import enable_python_dispatcher

        with self.fake_mode, enable_python_dispatcher():
            yield


_RECEIVED = "received."


def received_name(number: int) -> str:
    """The step input that holds value ``number`` of those the stage before hands on."""
    return f"{_RECEIVED}{number}"


def received(program: Program, ranks: int = 1) -> list[tuple[str, str, list[list[int]]]]:
    """Name, dtype and shape of what the stage before hands on, in order.

    A size is [n, 0], n itself, or [n, 1]: the share of one of n ranks in the tokens of the step.
    """
    found = []
    for node in program.placeholders("step"):
        name, value = program.inputs[node.name].source, node.meta["val"]
        if name.startswith(_RECEIVED):
            sizes = [token_size(program, size, ranks) for size in value.shape]
            shape = [size for size in sizes if size is not None]
            assert len(shape) == len(sizes), (name, value.shape)
            found.append((name, str(value.dtype).removeprefix("torch."), shape))
    return sorted(found, key=lambda item: int(item[0].removeprefix(_RECEIVED)))


def token_size(program: Program, size: Any, ranks: int) -> list[int] | None:
    """A size as in `received`; None if it is none of these."""
    if isinstance(size, int):
        return [size, 0]
    tokens = program.symbol("T")
    for parts in {1, ranks}:
        share: Any = (tokens + parts - 1) // parts
        if size.node.expr == share.node.expr:
            return [parts, 1]
    return None


def new_fake_mode() -> FakeTensorMode:
    """A fake mode in which sizes may be symbols."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that made the node, e.g. ``model.layers.0.mlp.up_proj``."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    return paths[-1].removeprefix("m.") if paths and paths[-1] != "m" else ""


def module_paths(node: fx.Node) -> list[str]:
    """Paths of all modules around the node, the outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [str(path).removeprefix("m.") for path, _ in stack.values() if str(path) != "m"]


def ancestors(nodes: Iterable[fx.Node], stop: Any = None) -> Iterator[fx.Node]:
    """Walk backwards from ``nodes``; do not walk past calls of the op ``stop``."""
    seen: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if stop is None or node.target is not stop:
            todo.extend(node.all_input_nodes)
