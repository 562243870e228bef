"""The law of the graph, as data, checked between any two passes.

A stage says which roles inputs may have, which attention op may stand in the graph, and what
the graph returns. The runner checks it after each pass, so that the pass which broke the law
is the pass that is named.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from fxlm.compiler.errors import ContractError
from fxlm.compiler.program import Program, Role, Stage

STAGES: tuple[Stage, ...] = ("captured", "bound", "paged", "final", "verified", "piece")


@dataclass(frozen=True, kw_only=True, slots=True)
class Law:
    """What holds at one stage.

    Attributes:
        roles: roles that placeholders may have.
        forbidden: ops that must not stand in the graph.
        num_outputs: values returned: logits alone, or (token_ids, logprobs, logprob_ids, ranks)
            and, with verification, num_accepted; taps come behind these. None: as many as the next
            stage takes.
    """

    roles: frozenset[Role]
    forbidden: tuple[str, ...]
    num_outputs: int | None


_DENSE: frozenset[Role] = frozenset({"step", "weight", "constant"})
_PAGED: frozenset[Role] = _DENSE | {"cache"}

LAWS: dict[Stage, Law] = {
    "captured": Law(roles=_DENSE, forbidden=("fxlm.paged_attention", "fxlm.sample"), num_outputs=1),
    "bound": Law(roles=_DENSE, forbidden=("fxlm.paged_attention", "fxlm.sample"), num_outputs=1),
    "paged": Law(roles=_PAGED, forbidden=("fxlm.attention", "fxlm.sample"), num_outputs=1),
    "final": Law(roles=_PAGED, forbidden=("fxlm.attention",), num_outputs=4),
    "verified": Law(roles=_PAGED, forbidden=("fxlm.attention",), num_outputs=5),
    "piece": Law(roles=_PAGED, forbidden=("fxlm.attention",), num_outputs=None),
}


def check(program: Program) -> None:
    """Raise ContractError if the program breaks the law of its stage."""
    law = LAWS[program.stage]
    for node in program.graph.nodes:
        problem = _problem(program, node, law)
        if problem:
            raise ContractError(f"stage {program.stage}: {problem}")
    returned = program.output().args[0]
    count = len(returned) if isinstance(returned, (tuple, list)) else 1
    wanted = (law.num_outputs or 0) + len(program.taps)
    if law.num_outputs is not None and count != wanted:
        raise ContractError(
            f"stage {program.stage}: the graph returns {count} values, must be {wanted}"
        )
    if not program.attentions():
        raise ContractError("no attention op in the graph: attention bypasses the interface")


def _problem(program: Program, node: fx.Node, law: Law) -> str:
    """What is unlawful about one node; empty if nothing."""
    if node.op == "placeholder":
        spec = program.inputs.get(node.name)
        if spec is None:
            return f"input {node.name} has no role"
        return "" if spec.role in law.roles else f"input {node.name} has role {spec.role}"
    if node.op == "output":
        return ""
    if node.op != "call_function":
        return f"node {node.name} is a {node.op}; only calls of functions are lawful"
    if "val" not in node.meta:
        return f"node {node.name} has no metadata; make nodes with Program.call"
    if not _known(node.target):
        return f"node {node.name} calls {node.target}, which is neither an op nor arithmetic"
    name = str(node.target)
    return (
        f"{name} must not stand here"
        if name.startswith(law.forbidden) and any(name.startswith(f + ".") for f in law.forbidden)
        else ""
    )


def _known(target: object) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return True
    module = getattr(target, "__module__", "")
    return target is operator.getitem or module in {"_operator", "torch", "math", "torch.sym_ops"}
