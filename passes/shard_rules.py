"""Which layout each op gives for the layouts that it is given.

Here: one rule for a kind of op; a rule may change the node (sizes that it names, operands that it
needs otherwise) and returns the layout of the result. An op without a rule gets whole operands:
the result is right, and only costs a gather. Not here: how a layout is changed (`sharder`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxlm.passes.layout import (
    COPIES,
    OWNED,
    PARTIAL,
    ROWS,
    WHOLE,
    Layout,
    is_pointwise,
    is_tensor,
    split,
    viewed_dim,
)
from fxlm.passes.sharder import Sharder

aten = torch.ops.aten

Rule = Callable[[Sharder, Any], Layout]

# Linear in their first operand: a sum over the ranks may be taken behind them.
_LINEAR = (*COPIES, aten.neg.default, aten.mul.Scalar, aten.div.Scalar)
_SCALINGS = (aten.mul.Tensor, aten.div.Tensor, aten.mul_.Tensor, aten.div_.Tensor)
_SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.add_.Tensor)
_GATHERED = (aten.index.Tensor, aten.embedding.default, aten.index_select.default)


def apply(sharder: Sharder, node: fx.Node) -> Layout:
    """Bring the operands of ``node`` into layouts that it can take; gives that of its result."""
    target: Any = node.target
    rule = RULES.get(target) or OURS.get(str(target))
    begins = target in _STARTS or str(target) in OURS
    if not begins and all(sharder.layout(i) == WHOLE for i in node.all_input_nodes):
        return WHOLE
    if rule is None and is_pointwise(target):
        rule = pointwise
    return (rule or unknown)(sharder, node)


def unknown(sharder: Sharder, node: Any) -> Layout:
    """Whole operands; beside rows that the rank owns the op is the rank's own affair."""
    owned = False
    for operand in node.all_input_nodes:
        if sharder.layout(operand).kind in ("rows", "owned"):
            owned = True
        else:
            replace(sharder, node, operand, sharder.whole(operand))
    return OWNED if owned else WHOLE


def replace(sharder: Sharder, node: Any, old: fx.Node, new: fx.Node) -> None:
    """Let ``node`` use ``new`` for ``old``."""
    if old is not new:
        if node.target._schema.is_mutable and node.args[0] is old:
            raise sharder.refuse(node, f"{node.target} writes into a value that is cut")
        node.replace_input_with(old, new)


# ---- element by element ----------------------------------------------------------------------


def pointwise(sharder: Sharder, node: Any) -> Layout:
    """Operands with the same split stay; sums over ranks wait behind what is linear."""
    operands = [i for i in node.all_input_nodes if is_tensor(i)]
    kinds = {sharder.layout(i).kind for i in operands}
    if kinds & {"rows", "owned"}:
        return _by_row(sharder, node, operands)
    if "partial" in kinds:
        if stays_partial(sharder, node, operands):
            return PARTIAL
        for operand in operands:
            if sharder.layout(operand) == PARTIAL:
                replace(sharder, node, operand, sharder.whole(operand))
    places = {_from_right(sharder, i) for i in node.all_input_nodes if _is_split(sharder, i)}
    if not places:
        return WHOLE
    if len(places) > 1:
        return unknown(sharder, node)
    ((place, parts),) = places
    for operand in node.all_input_nodes:
        _align(sharder, node, operand, place, parts)
    return split(len(sharder.shape(node)) - place, parts)


def _by_row(sharder: Sharder, node: Any, operands: list[fx.Node]) -> Layout:
    """Zero rows stay zero under what is linear; any other op leaves them to their rank."""
    kinds = [sharder.layout(i).kind for i in operands]
    if "partial" in kinds or "split" in kinds:
        return unknown(sharder, node)
    if node.target in _LINEAR and kinds == ["rows"]:
        return ROWS
    if node.target in _SCALINGS and kinds[0] == "rows":
        return ROWS
    if node.target in _SUMS and all(kind == "rows" for kind in kinds):
        return ROWS
    return OWNED


def stays_partial(sharder: Sharder, node: Any, operands: list[fx.Node]) -> bool:
    """Whether the op may run before the sum over the ranks; a bias is then added once."""
    layouts = [sharder.layout(i) for i in operands]
    if node.target in _LINEAR:
        return True
    if node.target in _SCALINGS:
        divides = node.target in (aten.div.Tensor, aten.div_.Tensor)
        first = layouts[0] == PARTIAL and node.args[0] is operands[0]
        return layouts.count(PARTIAL) == 1 and _rest_whole(layouts) and (first or not divides)
    if node.target not in _SUMS or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return False
    others = [i for i, layout in zip(operands, layouts, strict=True) if layout != PARTIAL]
    if not all(_is_bias(sharder, i) for i in others):
        return False
    for operand in others:
        replace(sharder, node, operand, sharder.on_first_rank(operand))
    return True


def _rest_whole(layouts: list[Layout]) -> bool:
    return all(layout in (PARTIAL, WHOLE) for layout in layouts)


def _is_bias(sharder: Sharder, node: Any) -> bool:
    """A weight, or rows looked up in one."""
    looked_up = node.target in _GATHERED and node.args[0] in sharder.fixed
    return node in sharder.fixed or (looked_up and sharder.layout(node) == WHOLE)


def _is_split(sharder: Sharder, node: Any) -> bool:
    return sharder.layout(node).kind == "split"


def _from_right(sharder: Sharder, node: fx.Node) -> tuple[int, int]:
    """Place of the split dimension counted from the right, as broadcasting does, and parts."""
    layout = sharder.layout(node)
    return len(sharder.shape(node)) - layout.dim, layout.parts


def _align(sharder: Sharder, node: Any, operand: fx.Node, place: int, parts: int) -> None:
    """Cut a whole operand like the others, unless it is broadcast there."""
    if not is_tensor(operand) or _is_split(sharder, operand):
        return
    shape = sharder.shape(operand)
    if len(shape) >= place and shape[-place] != 1:
        replace(sharder, node, operand, sharder.cut(operand, len(shape) - place, parts))


# ---- shapes ----------------------------------------------------------------------------------


def _keeping(sharder: Sharder, node: Any, moved: Callable[[Layout], int | None]) -> Layout:
    """Ops that only move elements: a split goes where ``moved`` says; None tears it."""
    layout = sharder.layout(node.args[0])
    if layout.kind != "split":
        return layout
    dim = moved(layout)
    return unknown(sharder, node) if dim is None else split(dim, layout.parts)


def view(sharder: Sharder, node: Any) -> Layout:
    """``view`` and ``reshape``: sizes that they name are those of the rank."""
    source = node.args[0]
    before, after = sharder.shape(source), sharder.shape(node)

    def moved(layout: Layout) -> int | None:
        place = viewed_dim(before, after, layout.dim, layout.parts)
        return place if place is not None and _rename(node, 1, place, after, layout) else None

    return _keeping(sharder, node, moved)


def _rename(node: Any, at: int, place: int, after: tuple[int, ...], layout: Layout) -> bool:
    """Put the rank's size into the list of sizes at argument ``at``; False if it is no number."""
    named = list(node.args[at])
    if not isinstance(named[place], int):
        return False
    if named[place] != -1:
        named[place] = after[place] // layout.parts
    node.update_arg(at, named)
    return True


def flatten(sharder: Sharder, node: Any) -> Layout:
    """``flatten`` and ``unflatten`` as views; the latter names sizes."""
    before, after = sharder.shape(node.args[0]), sharder.shape(node)
    return _keeping(sharder, node, lambda at: viewed_dim(before, after, at.dim, at.parts))


def expand(sharder: Sharder, node: Any) -> Layout:
    """``expand``: dimensions count from the right."""
    before, after = sharder.shape(node.args[0]), sharder.shape(node)

    def moved(layout: Layout) -> int | None:
        place = len(after) - len(before) + layout.dim
        return place if _rename(node, 1, place, after, layout) else None

    return _keeping(sharder, node, moved)


def transpose(sharder: Sharder, node: Any) -> Layout:
    """Two dimensions change places."""
    rank = len(sharder.shape(node))
    given = node.args[1:3] if len(node.args) > 2 else (0, 1)
    one, other = (d % rank for d in given)
    swapped = {one: other, other: one}
    return _keeping(sharder, node, lambda at: swapped.get(at.dim, at.dim))


def permute(sharder: Sharder, node: Any) -> Layout:
    """Dimensions in a new order."""
    order = [d % len(node.args[1]) for d in node.args[1]]
    return _keeping(sharder, node, lambda at: order.index(at.dim))


def unsqueeze(sharder: Sharder, node: Any) -> Layout:
    """One more dimension."""
    along = node.args[1] % len(sharder.shape(node))
    return _keeping(sharder, node, lambda at: at.dim + (at.dim >= along))


def squeeze(sharder: Sharder, node: Any) -> Layout:
    """One dimension less, or none if it is not 1."""
    before = sharder.shape(node.args[0])
    along = node.args[1] % len(before)
    gone = len(sharder.shape(node)) < len(before)
    return _keeping(sharder, node, lambda at: at.dim - (gone and at.dim > along))


def along(sharder: Sharder, node: Any) -> Layout:
    """Ops along one dimension (argument 1, or ``dim``), which must not be the one that is cut."""
    rank = len(sharder.shape(node.args[0]))
    place = 2 if node.target in _SECOND else 1
    given = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    dim = given % rank
    gone = node.target is aten.select.int

    def moved(layout: Layout) -> int | None:
        return None if layout.dim == dim else layout.dim - (gone and layout.dim > dim)

    if sharder.layout(node.args[0]) == PARTIAL and node.target in _NOT_LINEAR:
        return unknown(sharder, node)
    return _keeping(sharder, node, moved)


def item(sharder: Sharder, node: Any) -> Layout:
    """One of several results."""
    return sharder.layout(node.args[0])


def cat(sharder: Sharder, node: Any) -> Layout:
    """As element by element, along any other dimension than the one that is cut."""
    rank = len(sharder.shape(node))
    along_dim = (node.args[1] if len(node.args) > 1 else 0) % rank
    layouts = {sharder.layout(i) for i in node.all_input_nodes}
    if layouts == {PARTIAL}:
        return PARTIAL
    cuts = {layout for layout in layouts if layout.kind == "split"}
    if len(cuts) != 1 or layouts - cuts - {WHOLE}:
        return unknown(sharder, node)
    (layout,) = cuts
    if layout.dim == along_dim:
        return unknown(sharder, node)
    for operand in node.all_input_nodes:
        replace(sharder, node, operand, sharder.cut(operand, layout.dim, layout.parts))
    return layout


def stack(sharder: Sharder, node: Any) -> Layout:
    """Equal splits stay, at most one place further right."""
    layouts = {sharder.layout(i) for i in node.all_input_nodes}
    if len(layouts) != 1:
        return unknown(sharder, node)
    (layout,) = layouts
    if layout.kind != "split":
        return layout
    new_dim = (node.args[1] if len(node.args) > 1 else 0) % len(sharder.shape(node))
    return split(layout.dim + (layout.dim >= new_dim), layout.parts)


def first_alone(sharder: Sharder, node: Any) -> Layout:
    """``type_as``: of the second operand the dtype counts alone."""
    return sharder.layout(node.args[0])


# ---- sums and norms --------------------------------------------------------------------------


def reduction(sharder: Sharder, node: Any) -> Layout:
    """``sum`` and ``mean`` over dimensions: over the one that is cut the ranks' sums add up."""
    source = node.args[0]
    layout = sharder.layout(source)
    if layout.kind != "split":
        return layout if layout == PARTIAL else unknown(sharder, node)
    rank = len(sharder.shape(source))
    dims = {d % rank for d in node.args[1]}
    keeps = len(node.args) > 2 and node.args[2]
    if layout.dim not in dims:
        gone = 0 if keeps else sum(d < layout.dim for d in dims)
        return split(layout.dim - gone, layout.parts)
    if layout.parts != sharder.ranks:
        return unknown(sharder, node)
    if node.target is aten.mean.dim:  # the mean of equal parts' means
        scaled = sharder.behind(node, aten.div.Scalar, node, sharder.ranks)
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        sharder.whole_sizes[scaled] = sharder.shape(node)
        sharder.settle(scaled, PARTIAL)
    return PARTIAL


def norm(sharder: Sharder, node: Any) -> Layout:
    """``layer_norm`` and ``rms_norm`` over the last dimensions."""
    source = node.args[0]
    layout = sharder.layout(source)
    first = len(sharder.shape(source)) - len(node.args[1])
    if layout.kind == "split" and layout.dim < first:
        return layout
    return unknown(sharder, node)


# ---- matmuls, tables, attention --------------------------------------------------------------


def linear(sharder: Sharder, node: Any) -> Layout:
    """By columns over a whole input, by rows over one that is cut along its features."""
    x, weight, *rest = node.args
    bias = rest[0] if rest else node.kwargs.get("bias")
    if weight not in sharder.fixed:
        return unknown(sharder, node)
    layout = sharder.layout(x)
    last = len(sharder.shape(x)) - 1
    if layout.kind == "split" and layout.dim != last:
        return layout
    if layout == split(last, sharder.ranks):
        return _by_rows(sharder, node, weight, bias)
    if layout.kind in ("rows", "owned"):
        return OWNED
    replace(sharder, node, x, sharder.whole(x))
    parts = sharder.columns.get(node)
    return WHOLE if parts is None else _by_columns(sharder, node, weight, bias, parts)


def _by_rows(sharder: Sharder, node: Any, weight: fx.Node, bias: Any) -> Layout:
    node.update_arg(1, sharder.cut(weight, 1, sharder.ranks))
    if bias is not None:
        _set_bias(node, sharder.on_first_rank(bias))
    sharder.counts["rows"] += 1
    return PARTIAL


def _by_columns(sharder: Sharder, node: Any, weight: fx.Node, bias: Any, parts: int) -> Layout:
    node.update_arg(1, cut_rows(sharder, weight, parts))
    if bias is not None:
        _set_bias(node, cut_rows(sharder, bias, parts))
    sharder.counts["columns"] += 1
    return split(len(sharder.shape(node)) - 1, parts)


def _set_bias(node: Any, bias: fx.Node) -> None:
    node.args = (node.args[0], node.args[1], bias)
    node.kwargs = {}


def cut_rows(sharder: Sharder, weight: fx.Node, parts: int) -> fx.Node:
    """This rank's rows of a weight; where they do not divide, zeros follow the last ones."""
    extent = sharder.shape(weight)[0]
    length = -(-extent // parts)
    start = min(sharder.index(parts) * length, extent)
    length_here = min(length, extent - start)
    if length_here < 1:
        raise sharder.refuse(weight, f"{extent} rows are too few")
    part = sharder.parts.dense(sharder.parts.take(weight, 0, start, length_here))
    return sharder.parts.padded(part, length)


def embedding(sharder: Sharder, node: Any) -> Layout:
    """By vocabulary: a rank looks up its own tokens and gives zeros for the others."""
    table, ids = node.args[:2]
    if sharder.columns.get(node) is None:
        return unknown(sharder, node)
    ids = sharder.whole(ids)
    rows = -(-sharder.shape(table)[0] // sharder.ranks)
    dtype = ids.meta["val"].dtype
    with sharder.program.graph.inserting_before(node):
        first = sharder.constant(f"first_of_{rows}", sharder.rank * rows, dtype)
        call = sharder.program.call
        local = call(aten.sub.Tensor, ids, first, like=node)
        inside = call(aten.clamp.default, local, 0, rows - 1, like=node)
        foreign = call(aten.ne.Tensor, local, inside, like=node)
        mask = call(aten.unsqueeze.default, foreign, -1, like=node)
    node.args = (cut_rows(sharder, table, sharder.ranks), inside, *node.args[2:])
    found = sharder.behind(node, aten.masked_fill.Scalar, node, mask, 0.0)
    node.replace_all_uses_with(found, delete_user_cb=lambda user: user is not found)
    sharder.whole_sizes[found] = sharder.shape(node)
    sharder.settle(found, PARTIAL)
    sharder.counts["tables"] += 1
    return PARTIAL


def attention(sharder: Sharder, node: Any) -> Layout:
    """By heads; a KV head that several ranks need is on each of them."""
    q, k, v, *settings = node.args
    heads, kv_heads = sharder.shape(q)[1], sharder.shape(k)[1]
    parts = kv_parts(sharder, node, heads, kv_heads)
    cut = [sharder.cut(q, 1, sharder.ranks), sharder.cut(k, 1, parts), sharder.cut(v, 1, parts)]
    extras = [
        sharder.cut(value, 0, sharder.ranks) if isinstance(value, fx.Node) else value
        for value in settings
    ]
    node.args = (*cut, *extras)
    sharder.counts["attention"] += 1
    return split(2, sharder.ranks)


def kv_parts(sharder: Sharder, node: Any, heads: int, kv_heads: int) -> int:
    """Into how many parts the KV heads go; raises if heads do not divide."""
    if heads % sharder.ranks:
        raise sharder.refuse(node, f"{heads} query heads do not divide")
    if kv_heads % sharder.ranks == 0:
        return sharder.ranks
    if sharder.ranks % kv_heads == 0:
        return kv_heads
    raise sharder.refuse(node, f"{kv_heads} KV heads neither divide nor are divided")


# ---- experts ---------------------------------------------------------------------------------


def grouped_linear(sharder: Sharder, node: Any) -> Layout:
    """Rows of this rank's experts; whoever has the expert has the row."""
    if sharder.layout(node.args[2]) != OWNED:
        return unknown(sharder, node)
    x = node.args[0]
    if sharder.layout(x).kind not in ("rows", "owned"):
        raise sharder.refuse(node, "its rows are not those that the router sorted")
    return ROWS


def index(sharder: Sharder, node: Any) -> Layout:
    """Rows in another order: back in the order of the tokens the ranks' rows add up."""
    source, indices = node.args
    layout = sharder.layout(source)
    kinds = {sharder.layout(i).kind for i in indices if i is not None}
    if layout == ROWS and kinds == {"owned"} and _restores_order(node):
        return PARTIAL
    if layout == PARTIAL and kinds == {"whole"}:
        return PARTIAL
    return unknown(sharder, node)


def _restores_order(node: Any) -> bool:
    """Whether the index is the inverse of the sort by expert: ``argsort(argsort(ids))``."""
    (by,) = node.args[1]
    sorts = (aten.argsort.default, aten.argsort.stable)
    return by.target in sorts and by.args[0].target in sorts


_SECOND = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
_NOT_LINEAR = (aten.softmax.int, aten._softmax.default)
_STARTS = (aten.linear.default, aten.embedding.default)

RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten._unsafe_view.default), view),
    **dict.fromkeys((aten.flatten.using_ints,), flatten),
    **dict.fromkeys((aten.transpose.int, aten.t.default), transpose),
    **dict.fromkeys((aten.slice.Tensor, aten.select.int, aten.narrow.default), along),
    **dict.fromkeys((*_SECOND, *_NOT_LINEAR), along),
    **dict.fromkeys((aten.sum.dim_IntList, aten.mean.dim), reduction),
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default), norm),
    aten.permute.default: permute,
    aten.unsqueeze.default: unsqueeze,
    aten.squeeze.dim: squeeze,
    aten.expand.default: expand,
    aten.cat.default: cat,
    aten.stack.default: stack,
    aten.type_as.default: first_alone,
    aten.linear.default: linear,
    aten.embedding.default: embedding,
    aten.index.Tensor: index,
    operator.getitem: item,
}
# Ours are registered later than this file is imported.
OURS: dict[str, Rule] = {
    "fxlm.attention.default": attention,
    "fxlm.grouped_linear.default": grouped_linear,
}
