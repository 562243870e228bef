"""PassReport: what one pass did, in numbers and as a readable diff."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True, kw_only=True, slots=True)
class PassReport:
    """One line of the pipeline's log.

    Attributes:
        name: the pass.
        rewrites: places rewritten, as the pass counts them.
        nodes_before, nodes_after: calls in the graph.
        seconds: time of the pass, without checks.
        added, removed: ops by name and how many more or fewer there are now.
        source_digest: SHA-256 of the source text of the pass.
        stage: stage of the program after the pass.
    """

    name: str
    rewrites: int
    nodes_before: int
    nodes_after: int
    seconds: float
    added: dict[str, int]
    removed: dict[str, int]
    source_digest: str
    stage: str

    def line(self) -> str:
        """The report on one line."""
        return (
            f"{self.name:<20} {self.rewrites:>5} rewrites "
            f"{self.nodes_before:>6} -> {self.nodes_after:<6} nodes {self.seconds * 1e3:8.1f} ms"
        )


def op_counts(graph: fx.Graph) -> Counter[str]:
    """How often each op is called."""
    return Counter(str(n.target) for n in graph.nodes if n.op == "call_function")


def op_diff(before: Counter[str], after: Counter[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Ops that became more, and ops that became fewer."""
    return dict(after - before), dict(before - after)


def format_graph(graph: fx.Graph) -> list[str]:
    """One line a node: name, op, arguments, shape."""
    return [_line(node) for node in graph.nodes]


def format_diff(before: Sequence[str], after: Sequence[str], context: int = 2) -> str:
    """Unified diff of two formatted graphs."""
    return "\n".join(difflib.unified_diff(before, after, "before", "after", "", "", context, ""))


def _line(node: fx.Node) -> str:
    value: Any = node.meta.get("val")
    shape = f"  # {list(value.shape)} {value.dtype}" if hasattr(value, "shape") else ""
    if node.op == "placeholder":
        return f"input {node.name}{shape}"
    args = ", ".join(map(str, node.args))
    kwargs = "".join(f", {k}={v}" for k, v in node.kwargs.items())
    return f"{node.name} = {node.target}({args}{kwargs}){shape}"
