"""One model over several stages: each runs some of the layers and hands on what the others need.

before:  x = embed(ids); x = layer 0(x); ...; x = layer 7(x); return sample(head(x))
after:   stage 0:  x = embed(ids); ...; x = layer 3(x); return x
         stage 1:  x = received; x = layer 4(x); ...; return sample(head(x))

The cut is found from the graph: layers are the members of the module list that holds the
attention. What is alive between two stages is returned by one and is a step input of the next,
named ``received.0`` and so on; what follows from the step's inputs and constants alone (rotary
tables) is computed by each stage for itself. Weights, caches and code of other layers leave the
graph; a weight that both ends use (a tied embedding) stays in both. Stages get contiguous layers,
such that the largest share of weight bytes that a step reads is as small as can be.

Runs behind the passes that need the whole model, on a rank's own part where `shard` was before
it: rank t of a stage hands on to rank t of the next. Not here: sending (`fxlm.runtime.parallel`).
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxlm.compiler.errors import PassError
from fxlm.compiler.outline import layer_ranks
from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Input, Program, received_name, token_size
from fxlm.compiler.values import is_effect

aten = torch.ops.aten


@graph_pass(requires="sample", after="verify", before="fuse_quantized_linear", stage="piece")
def cut_stages(program: Program, *, stages: int, stage: int, ranks: int = 1) -> int:
    """Leave to this stage its layers; returns how many attentions it has.

    Args:
        stages: how many share the model.
        stage: which of them the graph is for, from 0.
        ranks: how many share each layer, and with ``--sequence-parallel`` the tokens.

    Raises:
        PassError: fewer layers than stages, or a value that cannot be handed on.
    """
    _read_sizes_off_inputs(program)
    weights = program.weight_only()
    free = _free(program)
    layers = layer_ranks(program.graph)
    moving = [n for n in program.graph.nodes if n in layers and n not in free | weights]
    stage_of = _assign(program, moving, layers, weights, stages)
    incoming = _alive(moving, stage_of, stage)
    outgoing = _alive(moving, stage_of, stage + 1) if stage + 1 < stages else []
    _check(program, [*incoming, *outgoing], ranks)
    received = _receive(program, incoming)
    if outgoing:
        _hand_on(program, [received.get(n, n) for n in outgoing])
    for node in reversed(moving):
        if stage_of[node] != stage:
            program.graph.erase_node(node)
    program.eliminate_dead_code()
    _keep_caches(program)
    program.propagate()
    _report(program, stage, stages, incoming, outgoing)
    return len(program.attentions())


def _read_sizes_off_inputs(program: Program) -> None:
    """The number of tokens is known everywhere; it need not be read off a value of a layer."""
    ids = program.find_step_input("input_ids")
    tokens = program.symbol("T")
    found = [
        n
        for n in program.find(aten.sym_size.int)
        if n.args[0] is not ids and _same(n.meta["val"], tokens)
    ]
    if found:
        first = next(n for n in program.graph.nodes if n.op != "placeholder")
        with program.graph.inserting_before(first):
            size = program.call(aten.sym_size.int, ids, 1, like=ids)
        for node in found:
            program.replace(node, size)


def _same(size: Any, symbol: torch.SymInt) -> bool:
    return isinstance(size, torch.SymInt) and bool(size.node.expr == symbol.node.expr)


def _free(program: Program) -> set[fx.Node]:
    """What follows from step inputs and constants: every stage can compute it."""
    known = set(program.placeholders("step") + program.placeholders("constant"))
    for node in program.graph.nodes:
        ready = all(i in known for i in node.all_input_nodes)
        if node.op == "call_function" and ready and not is_effect(node):
            known.add(node)
    return known


# ---- who gets what ----------------------------------------------------------------------------


def _assign(
    program: Program, moving: Sequence[fx.Node], ranks: dict[fx.Node, int],
    weights: set[fx.Node], stages: int,
) -> dict[fx.Node, int]:  # fmt: skip
    """The stage of each node."""
    last = max((ranks[n] for n in moving), default=0)
    layers = last - 1  # 0 comes before the layers, `last` behind them
    if layers < stages:
        raise PassError(
            f"{max(layers, 0)} layers cannot be cut into {stages} stages: use "
            f"--pipeline-parallel-size {max(layers, 1)} or less"
        )
    read = _read_bytes(moving, ranks, weights, last)
    costs = read[1:last]
    costs[-1] += read[last]
    spans = balanced(costs, stages)
    for number, (first, end) in enumerate(spans):
        share = sum(costs[first:end]) / max(sum(costs), 1)
        program.note(f"stage {number}: layers {first} to {end - 1}, {share:.0%} of what is read")
    of_rank = [0, *(s for s, (first, end) in enumerate(spans) for _ in range(first, end))]
    of_rank.append(stages - 1)
    found = {n: of_rank[ranks[n]] for n in moving}
    for node in moving:
        if node.target is operator.getitem:
            found[node] = found[node.all_input_nodes[0]]
    return found


def _read_bytes(
    moving: Sequence[fx.Node], ranks: dict[fx.Node, int], weights: set[fx.Node], last: int
) -> list[int]:
    """Bytes of weights that a step reads, before the layers, in each of them, and behind them.

    Of a table that tokens are looked up in, next to nothing is read.
    """
    used: list[set[fx.Node]] = [set() for _ in range(last + 1)]
    for node in moving:
        if node.target is not aten.embedding.default:
            used[ranks[node]] |= {i for i in node.all_input_nodes if i in weights}
    return [sum(n.meta["val"].nbytes for n in found if _is_tensor(n)) for found in used]


def balanced(costs: Sequence[int], parts: int) -> list[tuple[int, int]]:
    """Cut a row of costs into ``parts`` runs, none empty, so that the dearest is cheapest.

    Returns:
        First index and end of each run.
    """
    count = len(costs)
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best: list[tuple[float, list[int]]] = [(0.0, [0])] + [(math.inf, [])] * count
    for part in range(1, parts + 1):
        found: list[tuple[float, list[int]]] = [(math.inf, [])] * (count + 1)
        for end in range(part, count - (parts - part) + 1):
            found[end] = min(
                (max(best[cut][0], sums[end] - sums[cut]), [*best[cut][1], end])
                for cut in range(part - 1, end)
            )
        best = found
    ends = best[count][1]
    return list(itertools.pairwise(ends))


def _alive(moving: Sequence[fx.Node], stage_of: dict[fx.Node, int], stage: int) -> list[fx.Node]:
    """Values made before ``stage`` and used in it or behind it."""
    return [
        n
        for n in moving
        if stage_of[n] < stage
        and any(u.op == "output" or stage_of.get(u, -1) >= stage for u in n.users)
    ]


def _check(program: Program, values: Sequence[fx.Node], ranks: int) -> None:
    for node in values:
        shape = node.meta["val"].shape if _is_tensor(node) else [None]
        if any(size is None or token_size(program, size, ranks) is None for size in shape):
            raise PassError(
                f"{node.name} ({node.target}) is alive between two stages and is not a tensor of "
                "the step's tokens, so it cannot be handed on: use --pipeline-parallel-size 1"
            )


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor)


# ---- cutting ----------------------------------------------------------------------------------


def _receive(program: Program, incoming: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """A step input in place of each value that an earlier stage made."""
    received = {}
    for number, node in enumerate(incoming):
        like = node.meta["val"]
        with program.fake_mode:  # contiguous, whatever the value was
            value = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        name = received_name(number)
        spec = Input(role="step", source=name)
        received[node] = program.add_input(name.replace(".", "_"), spec, value)
        node.replace_all_uses_with(received[node])
    return received


def _hand_on(program: Program, values: Sequence[fx.Node]) -> None:
    """Return these; one that came from the stage before is a value of its own."""
    given = []
    with program.graph.inserting_before(program.output()):
        for node in values:
            passed = node.op == "placeholder"
            given.append(program.call(aten.clone.default, node, like=node) if passed else node)
    program.set_results(given)


def _keep_caches(program: Program) -> None:
    """Drop the caches of layers that are gone; those that are left are numbered anew."""
    kept = sorted({program.inputs[n.name].layer for n in program.placeholders("cache") if n.users})
    for node in program.placeholders("cache"):
        spec = program.inputs.pop(node.name)
        if node.users:
            layer = kept.index(spec.layer)
            program.inputs[node.name] = Input(role="cache", source=spec.source, layer=layer)
        else:
            program.graph.erase_node(node)
    program.caches = [program.caches[layer] for layer in kept]


def _report(
    program: Program, stage: int, stages: int, incoming: Sequence[fx.Node],
    outgoing: Sequence[fx.Node],
) -> None:  # fmt: skip
    def told(values: Sequence[fx.Node]) -> str:
        return ", ".join(f"{n.meta['val'].dtype} {list(n.meta['val'].shape)}" for n in values)

    program.note(
        f"this is stage {stage} of {stages}: takes {told(incoming) or 'tokens'}, "
        f"hands on {told(outgoing) or 'what was drawn'}"
    )
