"""Run a dense program over one sequence, and look at what goes into some of its nodes.

For measuring, not for serving: every op is interpreted, attention is the reference. Not here:
what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxlm.compiler.program import Program

Watch = Callable[..., None]


def run_watched(
    program: Program,
    read: Callable[[str], torch.Tensor],
    ids: Sequence[int],
    watches: Mapping[fx.Node, Watch],
) -> torch.Tensor:
    """Run a program that has no paged attention yet.

    Args:
        program: at stage ``bound``.
        read: a tensor of the checkpoint by name.
        ids: tokens of the sequence.
        watches: called with the positional arguments of their nodes, before those run.

    Returns:
        Logits [1, T, V].
    """
    assert program.stage == "bound", program.stage
    step = {
        "input_ids": torch.tensor([list(ids)]),
        "position_ids": torch.arange(len(ids))[None],
    }
    values = []
    for node in program.placeholders():
        spec = program.inputs[node.name]
        source: Any = {"step": step, "constant": program.constants}.get(spec.role)
        values.append(read(spec.source) if source is None else source[spec.source])
    with torch.inference_mode():
        (logits,) = _Watching(program.module, watches).run(*values)
    assert isinstance(logits, torch.Tensor), logits
    return logits


class _Watching(fx.Interpreter):
    """Interprets, and shows watched nodes' arguments."""

    def __init__(self, module: fx.GraphModule, watches: Mapping[fx.Node, Watch]) -> None:
        super().__init__(module)
        self._watches = watches

    def run_node(self, n: fx.Node) -> Any:
        watch = self._watches.get(n)
        if watch is not None:
            args, _ = self.fetch_args_kwargs_from_env(n)
            watch(*args)
        return super().run_node(n)
