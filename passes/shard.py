"""One model over several ranks: tensor parallelism found from the graph.

before:  q = linear(x, wq); ...; o = attention(q, k, v); y = linear(o, wo)
         h = silu(linear(x, wg)) * linear(x, wu); z = linear(h, wd)
after:   q = linear(x, wq[rows of this rank's heads]); ...; y = all_reduce(linear(o, wo[:, ...]))
         h = ... over this rank's columns; z = all_reduce(linear(h, wd[:, ...]))

Nothing is known of the model but its graph. The walk begins where a split pays: the linears that
q, k and v come from (by heads; a KV head goes to all ranks that need it), linears that lead
element by element to another linear (by columns), the experts, the token embedding and the
head (by vocabulary). From there `shard_rules` carries the layout from op to op; a sum over the
ranks waits until somebody needs it, so parallel branches share one. Whatever takes no cut value
gets the whole one. Two all-reduces a layer, one for the embedding and one gather of the logits
are what a usual model needs; the report says what was decided. With ``sequence_parallel`` an
all-reduce becomes a reduce-scatter over the tokens and a gather (`shard_tokens`).

Slices of weights are graph code pushed down to the raw tensors (`weight_parts`). The step graph
is the same on every rank: what differs is an input.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx

from fxlm.compiler.ops.collectives import collectives, sent_per_step
from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program, ancestors
from fxlm.passes import shard_rules, shard_tokens
from fxlm.passes.layout import is_pointwise, is_tensor, sizes
from fxlm.passes.merged_linears import part_merged_linears
from fxlm.passes.shard_experts import split_experts
from fxlm.passes.sharder import Sharder

aten = torch.ops.aten
LINEAR = aten.linear.default

_MOVES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.slice.Tensor,
    aten.transpose.int, aten.unsqueeze.default, aten.chunk.default,
)  # fmt: skip


def _attentions(program: Program) -> int:
    return len(program.attentions())


@graph_pass(after="cleanup", before="fuse_qkv", expects=_attentions)
def shard(program: Program, *, ranks: int, rank: int, sequence_parallel: bool = False) -> int:
    """Leave to this rank its part of the model; returns how many attentions were cut.

    Args:
        ranks: how many share the model.
        rank: which of them the graph is for, from 0.
        sequence_parallel: between the linears each rank has its share of the tokens alone; see
            `shard_tokens`.

    Raises:
        PassError: heads or widths do not divide; says which and the numbers.
    """
    part_merged_linears(program)
    sharder = Sharder(program, ranks, rank, sequence_parallel)
    _mark_attention(sharder)
    _mark_pairs(sharder)
    _mark_vocabulary(sharder)
    split_experts(sharder)
    for node in list(program.graph.nodes):
        if node.op == "call_function" and node not in sharder.fixed:
            given = sharder.layouts.get(node)
            found = given or shard_tokens.apply(sharder, node) or shard_rules.apply(sharder, node)
            sharder.settle(node, found)
    for node in list(program.output().all_input_nodes):
        program.output().replace_input_with(node, sharder.whole(node))
    program.propagate()
    _check_sizes(sharder)
    _report(sharder)
    return sharder.counts["attention"]


# ---- where a split begins --------------------------------------------------------------------


def _mark_attention(sharder: Sharder) -> None:
    """Projections of q, k and v, by heads."""
    for node in sharder.program.attentions():
        q, k, v = node.args[:3]
        heads, kv_heads = sharder.shape(q)[1], sharder.shape(k)[1]  # type: ignore[arg-type]
        parts = shard_rules.kv_parts(sharder, node, heads, kv_heads)
        for source, count in ((q, sharder.ranks), (k, parts), (v, parts)):
            for found in ancestors([source], stop=LINEAR):  # type: ignore[list-item]
                if found.target is LINEAR and sharder.shape(found)[-1] % count == 0:
                    # One projection of q and k for fewer KV heads than ranks stays whole.
                    same = sharder.columns.setdefault(found, count) == count
                    sharder.columns[found] = count if same else 1
    for found, count in list(sharder.columns.items()):
        if count == 1:
            del sharder.columns[found]


def _mark_pairs(sharder: Sharder) -> None:
    """Linears that lead element by element to another one: it then takes what is cut."""
    seconds: set[fx.Node] = set()
    for node in sharder.program.find(LINEAR):
        firsts = _firsts(sharder, node)
        if not firsts or firsts & (seconds | set(sharder.columns)):
            continue
        for first in firsts:
            width = sharder.shape(first)[-1]
            if width % sharder.ranks:
                raise sharder.refuse(first, f"{width} output features do not divide")
            sharder.columns[first] = sharder.ranks
        seconds.add(node)


def _firsts(sharder: Sharder, second: Any) -> set[fx.Node]:
    """The linears whose outputs are the input of ``second``, if nothing else decides it."""
    if second.args[1] not in sharder.fixed:
        return set()
    found: set[fx.Node] = set()
    todo, seen = [second.args[0]], set()
    width = sharder.shape(second.args[0])[-1]
    while todo:
        node = todo.pop()
        if node in seen or node in sharder.fixed or not is_tensor(node):
            continue
        seen.add(node)
        if node.target is LINEAR and node.args[1] in sharder.fixed:
            if sharder.shape(node)[-1] == width:
                found.add(node)
            continue
        if not is_pointwise(node.target) and node.target not in _MOVES:
            return set()
        todo.extend(node.all_input_nodes)
    return found


def _mark_vocabulary(sharder: Sharder) -> None:
    """The tables that tokens are looked up in, and the linear that ends in the logits."""
    program = sharder.program
    tokens = program.find_step_input("input_ids")
    for node in program.find(aten.embedding.default):
        table, ids = node.args[:2]
        if table in sharder.fixed and tokens in ancestors([ids]):  # type: ignore[list-item]
            sharder.columns[node] = sharder.ranks
    node = program.logits()
    while is_pointwise(node.target) or node.target in _MOVES:
        moving = [i for i in node.all_input_nodes if i not in sharder.fixed and is_tensor(i)]
        if len(moving) != 1:
            return
        node = moving[0]
    if node.target is LINEAR and node.args[1] in sharder.fixed:
        sharder.columns[node] = sharder.ranks


# ---- afterwards ------------------------------------------------------------------------------


def _check_sizes(sharder: Sharder) -> None:
    """What every value's shape must be by its layout: our own arithmetic, looked over."""
    for node, before in sharder.whole_sizes.items():
        layout = sharder.layout(node)
        if node not in sharder.layouts or layout.kind in ("rows", "owned"):
            continue
        wanted = [
            -(-size // layout.parts) if d == layout.dim else size for d, size in enumerate(before)
        ]
        assert list(sizes(node)) == wanted, (node.format_node(), layout, wanted)


def _report(sharder: Sharder) -> None:
    program, counts = sharder.program, sharder.counts
    kv = Counter(sizes(n.args[1])[1] for n in program.attentions())
    heads = Counter(sizes(n.args[0])[1] for n in program.attentions())
    program.note(
        f"rank {sharder.rank} of {sharder.ranks}: query heads a layer {_counted(heads)}, "
        f"KV heads {_counted(kv)}"
    )
    program.note(
        f"linears by columns {counts['columns']}, by rows {counts['rows']}, "
        f"tables by vocabulary {counts['tables']}"
    )
    if counts["experts"]:
        program.note(f"experts split in {counts['experts']} layers, "
                     f"{counts['experts a rank']} a rank")  # fmt: skip
    made = Counter(str(n.target).split(".")[1] for n in collectives(program.graph))
    program.note("collectives: " + ", ".join(f"{made[name]} {name}" for name in sorted(made)))
    if sharder.over_tokens:
        sent = sent_per_step(program, sharder.ranks)["per_token"]
        program.note(
            f"sequence parallel: {made['reduce_scatter']} sums split over the tokens, gathered "
            f"{counts['tokens gathered']} times; {made['all_reduce']} sums whole; "
            f"{sent} bytes sent by a rank for a token with logits"
        )
    if counts["gathered"] or counts["sliced"]:
        program.note(
            f"values gathered {counts['gathered']} times, cut again {counts['sliced']} times"
        )


def _counted(values: Counter[int]) -> str:
    return ", ".join(f"{value} ({times}x)" for value, times in sorted(values.items()))
