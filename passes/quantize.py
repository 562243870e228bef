"""Quantize the weights of linear layers while they are loaded.

before:  y = linear(x, w, b)
after:   codes, scale, offset = fxlm.quantize_int(w, 4, 128, False)
         y = linear(x, fxlm.dequantize(codes, scale, offset, None, 4, [1, 128], ...), b)

Weight code alone, so `hoist` moves it to load time; the linears stay, for `fuse_quantized_linear`
to find. Which layers get which scheme is the text of ``--quantization``
(`fxlm.compiler.schemes`). Left alone: the layer that gives the logits unless it is named, routers
of experts (a rounded score sends a token elsewhere), weights that are quantized already or depend
on tokens. An embedding that is tied to a quantized layer reads the quantized rows.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxlm.compiler.errors import InvalidOption
from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program, ancestors, module_path
from fxlm.compiler.schemes import HEAD, OPTION, Quantization, Scheme, parse_quantization
from fxlm.passes.quantized_weights import quantized

aten = torch.ops.aten
ops = torch.ops.fxlm
LINEAR = aten.linear.default
CHOICES = (aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.default)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What becomes of one linear layer.

    Attributes:
        node: the ``aten.linear``.
        path: of its module.
        scheme: fitted to its inputs; None: it stays as it is.
        reason: why it stays, or ``""``.
    """

    node: fx.Node
    path: str
    scheme: Scheme | None
    reason: str = ""

    @property
    def weight(self) -> fx.Node:
        """The node of the weight."""
        weight = self.node.args[1]
        assert isinstance(weight, fx.Node), self.node.format_node()
        return weight


@graph_pass(after="cleanup", before=("fuse_qkv", "fuse_gate_up"))
def quantize(program: Program, *, quantization: str = "none") -> int:
    """Quantize by the rules of a text such as ``int4,head=int8``; returns how many weights.

    Raises:
        InvalidOption: a pattern that fits no linear layer, or no layer to quantize at all.
    """
    done: dict[tuple[fx.Node, str], fx.Node] = {}
    for choice in choose(program, quantization):
        if choice.scheme is None:
            program.miss(choice.node, choice.reason)
            continue
        weight = choice.weight
        key = (weight, choice.scheme.name)
        if key not in done:
            done[key] = _quantize(program, weight, choice.scheme, choice.node)
            _keep_tied(weight, done[key])
        choice.node.replace_input_with(weight, done[key])
    return len(done)


def _keep_tied(weight: fx.Node, quantized: fx.Node) -> None:
    """Let an embedding read the rows of the quantized weight too: tied stays tied, held once."""
    for user in list(weight.users):
        if user.target is aten.embedding.default and user.args[0] is weight:
            user.replace_input_with(weight, quantized)


def choose(program: Program, quantization: str) -> list[Choice]:
    """What the rules of a text mean for each linear layer of a program.

    Raises:
        InvalidOption: a pattern that fits no linear layer, or no layer to quantize at all.
    """
    rules = parse_quantization(quantization)
    head = _head(program)
    fixed = program.weight_only()
    choices = []
    for node in program.linears():
        path, reason = module_path(node), _obstacle(node, fixed)
        scheme = rules.scheme_of(path, node is head)
        if reason or scheme is None:
            reason = reason or "the options leave it alone"
            choices.append(Choice(node=node, path=path, scheme=None, reason=reason))
        else:
            inputs = int(node.args[1].meta["val"].shape[1])  # type: ignore[union-attr]
            choices.append(Choice(node=node, path=path, scheme=scheme.fit(inputs)))
    _require_matches(rules, quantization, [c.path for c in choices], head is not None)
    if rules.default is not None and not any(c.scheme for c in choices):
        reason = choices[0].reason if choices else "the graph has no linear layers"
        raise InvalidOption(OPTION, quantization, f"nothing can be quantized; e.g. {reason}")
    return choices


def _head(program: Program) -> fx.Node | None:
    """The linear layer that the logits come from."""
    before = ancestors([program.logits()], stop=LINEAR)
    return next((n for n in before if n.target is LINEAR), None)


def _obstacle(node: fx.Node, fixed: set[fx.Node]) -> str:
    """Why a linear's weight cannot be quantized; empty if it can."""
    weight: Any = node.args[1]
    if weight not in fixed:
        return "the weight depends on tokens"
    value = weight.meta["val"]
    if quantized(weight) is not None:
        return "the weight is quantized already"
    if value.dim() != 2 or not value.is_floating_point():
        return f"the weight is {value.dtype} with {value.dim()} dimensions"
    return "it routes tokens to experts" if _routes(node) else ""


def _routes(linear: fx.Node) -> bool:
    """Whether its result is ranked before another matmul sees it."""
    todo, seen = list(linear.users), {linear}
    while todo:
        node = todo.pop()
        if node in seen or node.target is LINEAR:
            continue
        if node.target in CHOICES:
            return True
        seen.add(node)
        todo.extend(node.users)
    return False


def _require_matches(rules: Quantization, text: str, paths: list[str], has_head: bool) -> None:
    for pattern, scheme in rules.rules:
        only = Quantization(default=None, rules=((pattern, scheme),))
        if (pattern == HEAD and has_head) or scheme is None:
            continue
        if not any(only.scheme_of(path) for path in paths):
            near = ", ".join(paths[:3])
            raise InvalidOption(OPTION, text, f"{pattern!r} fits no linear layer (of {near}, ...)")


def _quantize(program: Program, weight: fx.Node, scheme: Scheme, like: fx.Node) -> fx.Node:
    rows, columns = scheme.block
    anchor = program.placeholders()[-1] if weight.op == "placeholder" else weight
    with program.graph.inserting_before(anchor.next):  # early, as all code on weights is
        if scheme.kind == "fp8":
            block = [rows, columns]
            both = program.call(ops.quantize_fp8.default, weight, block, like=like)
            codes, scale = _items(program, both, 2, like)
            offset = None
        else:
            given = (weight, scheme.bits, columns, scheme.symmetric)
            made = program.call(ops.quantize_int.default, *given, like=like)
            codes, scale, offset = _items(program, made, 3, like)
            offset = None if scheme.symmetric else offset
        return program.call(
            ops.dequantize.default, codes, scale, offset, None, scheme.bits, [rows, columns],
            weight.meta["val"].dtype, scheme.activation, like=like,
        )  # fmt: skip


def _items(program: Program, node: fx.Node, count: int, like: fx.Node) -> list[fx.Node]:
    return [program.call(operator.getitem, node, i, like=like) for i in range(count)]
