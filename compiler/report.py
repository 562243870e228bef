"""PassReport: what one pass did, in numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

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
        notes: what the pass decided, a line each.
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
    notes: tuple[str, ...] = ()

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
