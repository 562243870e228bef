"""Stages: the program before the first pass and after each one, and any of them as a callable.

Every stage takes the raw tensors of a checkpoint, so any two can be run on the same inputs.
That is what `explain`, `verify` and `bisect` stand on. Here: snapshots and their interpreter.
Not here: what is compared (``fxlm.runtime.explain``), the column itself (`pipeline`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fxlm.compiler import graph_json, ops
from fxlm.compiler.hoist import hoist
from fxlm.compiler.pipeline import GraphPass, run
from fxlm.compiler.program import Program
from fxlm.compiler.report import PassReport

Caches = Mapping[tuple[str, int], torch.Tensor]
Watch = Callable[[str, Any], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The program as one pass left it.

    Attributes:
        name: of the pass; ``captured`` before the first.
        program: a copy, which later passes do not touch. Node names are the same in every
            snapshot of one column, so a name identifies a value across stages.
        report: of the pass; None before the first.
        source: text of the pass's function.
        summary: the docstring of its module, or of the function.
    """

    name: str
    program: Program
    report: PassReport | None = None
    source: str = ""
    summary: str = ""


def walk(program: Program, passes: Iterable[GraphPass]) -> Iterator[Snapshot]:
    """Run the passes one by one, and give a snapshot before the first and after each.

    Raises:
        PassError: see `fxlm.compiler.pipeline.run`.
    """
    yield Snapshot(name="captured", program=program.copy())
    for item in passes:
        run(program, [item])
        yield Snapshot(
            name=item.name,
            program=program.copy(),
            report=program.log[-1],
            source=_source(item),
            summary=_summary(item),
        )


def _source(item: GraphPass) -> str:
    try:
        return inspect.getsource(item.run)
    except (OSError, TypeError):
        return "(typed in at a prompt: there is no source to show)"


def _summary(item: GraphPass) -> str:
    """What a pass says of itself; the module's words where the pass is alone in it."""
    module = inspect.getmodule(item.run)
    own = inspect.getdoc(item.run) or ""
    ours = item.run.__module__.startswith("fxlm.passes.")
    return (inspect.getdoc(module) or own) if ours and module else own


class Stage:
    """A snapshot ready to run by interpretation.

    Args:
        program: any stage of the column; it is left as it is.
        read: a tensor by the ``source`` of a weight input: at stage ``captured`` a parameter by
            its qualified name, later a tensor of the checkpoint.

    Attributes:
        paged: whether it takes caches and the metadata of a batch.
        sampled: whether it returns tokens and their log-probabilities instead of logits.
        cache_specs: KV memory that it takes, by layer.
        steer_size: width of the table of steering vectors that it takes; 0 for none.
    """

    def __init__(self, program: Program, read: Callable[[str], torch.Tensor]) -> None:
        ops.load()
        program = program.copy()
        self.cache_specs = program.caches
        self.steer_size = sum(program.steered.values())
        self.paged = program.stage not in ("captured", "bound")
        self.sampled = self.paged and program.stage != "paged"
        cut = hoist(program)
        self._inputs = cut.step_inputs
        self._weights = _load(program, cut, read)
        self._runner = graph_json.Runner(graph_json.dump(cut.step))

    def bind(self, caches: Caches) -> Callable[[Mapping[str, torch.Tensor]], list[torch.Tensor]]:
        """Steps over these caches."""
        return lambda inputs: self(inputs, caches)

    def __call__(
        self, inputs: Mapping[str, torch.Tensor], caches: Caches, watch: Watch | None = None
    ) -> list[torch.Tensor]:
        """Run one step.

        Args:
            inputs: step inputs by name; more than it takes may be given.
            caches: KV memory, written in place; unused before paging.
            watch: called with the name and the value of each node.
        """

        def fetch(name: str) -> torch.Tensor:
            spec = self._inputs[name]
            if spec.role == "weight":
                return self._weights[spec.source]
            return caches[spec.source, spec.layer] if spec.role == "cache" else inputs[spec.source]

        with torch.inference_mode():
            return self._runner.run(fetch, watch)


def _load(
    program: Program, cut: Any, read: Callable[[str], torch.Tensor]
) -> dict[str, torch.Tensor]:
    def fetch(name: str) -> torch.Tensor:
        spec = cut.load_inputs[name]
        constant = spec.role == "constant"
        return program.constants[spec.source] if constant else read(spec.source)

    with torch.inference_mode():
        values = graph_json.Runner(graph_json.dump(cut.load)).run(fetch)
    return dict(zip(cut.prepared, values, strict=True))
