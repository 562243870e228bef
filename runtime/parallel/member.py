"""A rank's part of the engine: its artifact, its memory, its weights, its groups.

Here: what rank 0 and the others do alike. Not here: orders and news.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

import torch
from torch._C import _distributed_c10d as c10d

from fxlm.compiler.errors import EngineDead, OutOfMemory
from fxlm.compiler.ops.collectives import TENSOR_GROUP, use_group
from fxlm.runtime import machine
from fxlm.runtime.compile import Compilation
from fxlm.runtime.memory import MemoryPlan, plan_memory
from fxlm.runtime.options import EngineOptions
from fxlm.runtime.parallel.group import LOOPBACK, RankGroup, join
from fxlm.runtime.parallel.place import Place
from fxlm.runtime.step import WorkerSpec
from fxlm.runtime.worker import ModelWorker, load_prepared, set_threads

MEETING_S = 120.0  # ranks load at their own pace; the first step touches every weight


class Member:
    """One rank.

    Args:
        options: of the engine.
        place: of this rank.
        local_ranks: how many ranks share this machine's memory.
    """

    def __init__(self, options: EngineOptions, place: Place, local_ranks: int) -> None:
        self.options = options
        self.place = place
        self.local_ranks = local_ranks
        self._tensor_group: RankGroup | None = None
        self._line: RankGroup | None = None  # of all ranks, where there are several stages

    def plan(self, compilation: Compilation) -> MemoryPlan:
        """Take the rank's artifact; gives what it has memory for."""
        self.compilation = compilation
        return plan_memory(compilation.artifact, self.options, share=self.local_ranks)

    def load(self, spec: WorkerSpec) -> None:
        """Allocate the cache and load the weights."""
        weights, _ = load_prepared(self.compilation, self.options)
        self.worker = ModelWorker(self.compilation.artifact, weights, spec)

    def join(self, store: str, host: str = LOOPBACK) -> None:
        """Meet the other ranks; then run one step of nothing, which touches every weight."""
        place, device = self.place, self.worker.device.type
        shared = open_store(store, place.size)
        if place.tensor_size > 1:
            name, rank, size = f"{TENSOR_GROUP}/{place.stage}", place.tensor_rank, place.tensor_size
            self._tensor_group = join(shared, name, rank, size, device, MEETING_S, host)
        if place.stages > 1:
            self._line = join(shared, "line", place.rank, place.size, device, MEETING_S, host)
        self.run(idle_step())
        if place.rank == 0 and self._line is not None:
            self.drawn(1)
        for group in (self._tensor_group, self._line):
            if group is not None:
                group.timeout_s = float(self.options.distributed_timeout_seconds)

    def run(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Run this rank's part of a step, and hand on what comes out of it.

        Returns:
            What the graph gave: tokens, if there is one stage.

        Raises:
            PeersLost: other ranks are gone.
            EngineDead: this one ran out of memory: they then wait for it in vain.
        """
        use_group(TENSOR_GROUP, self._tensor_group)  # another engine of this process has its own
        place, line = self.place, self._line
        try:
            if line is None:
                return self.worker.step(tensors)
            values = self.worker.step({**tensors, **self._received(line, tensors)})
        except OutOfMemory as error:
            raise EngineDead(f"one of several ranks cannot fail alone: {error}") from error
        except RuntimeError as error:
            if self._tensor_group is None or self._tensor_group.lost is None:
                raise
            raise self._tensor_group.lost from error
        target = place.rank + place.tensor_size
        if not place.is_last or place.rank == place.drawing:
            line.send(values, 0 if place.is_last else target, place.stages)
        return values

    def _received(
        self, line: RankGroup, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What the stage before hands on."""
        found = {}
        num_tokens = tensors["input_ids"].shape[1]
        for name, kind, shape in self.compilation.artifact.manifest["received"]:
            sizes = [-(-num_tokens // size) if shared else size for size, shared in shape]
            found[name] = self._empty(sizes, getattr(torch, kind))
            line.receive(found[name], self.place.rank - self.place.tensor_size)
        return found

    def drawn(self, rows: int) -> list[torch.Tensor]:
        """On rank 0: the results of the oldest step that the last stage has not told yet.

        Args:
            rows: of logits, of that step.
        """
        assert self._line is not None
        columns = self.compilation.artifact.manifest["model"]["max_logprobs"] + 1
        results = [
            self._empty([rows], torch.int64),
            self._empty([rows, columns], torch.float32),
            self._empty([rows, columns], torch.int64),
            self._empty([rows], torch.int64),
        ]
        for result in results:
            self._line.receive(result, self.place.drawing)
        return results

    def _empty(self, sizes: list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device=self.worker.device)


def open_store(store: str, size: int) -> c10d.Store:
    """The store of an address: ``file:PATH``, or ``tcp:HOST:PORT`` with a ``/PREFIX`` of keys."""
    kind, _, place = store.partition(":")
    if kind == "file":
        return c10d.FileStore(place, size)
    address, _, prefix = place.partition("/")
    host, _, port = address.rpartition(":")
    shared = c10d.TCPStore(host, int(port), None, False, timedelta(seconds=MEETING_S))
    return c10d.PrefixStore(prefix, shared) if prefix else shared


def share_cores(options: EngineOptions, local_ranks: int) -> tuple[int, str]:
    """Use this rank's share of the cores; gives their number and why."""
    if options.threads is not None:
        return set_threads(options.threads)
    cores, why = machine.num_cores()
    count, _ = set_threads(max(1, cores // local_ranks))
    return count, f"{why}, shared by {local_ranks} ranks"


def idle_step() -> dict[str, torch.Tensor]:
    """A step of one token that is written nowhere and draws nothing that anybody reads."""
    return {
        "input_ids": torch.zeros(1, 1, dtype=torch.int64),
        "position_ids": torch.zeros(1, 1, dtype=torch.int64),
        "slot_mapping": torch.full((1,), -1, dtype=torch.int64),
        "query_start": torch.tensor([0, 1], dtype=torch.int32),
        "seq_lens": torch.ones(1, dtype=torch.int32),
        "block_table": torch.zeros(1, 1, dtype=torch.int32),
        "logits_indices": torch.zeros(1, dtype=torch.int64),
        "sample_floats": torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 0.0]]),
        "sample_ints": torch.tensor([[0, 0, 1, -1, 0]]),
        "adjust_start": torch.zeros(2, dtype=torch.int32),
        "adjust_ids": torch.zeros(1, dtype=torch.int64),
        "adjust_counts": torch.zeros(1, dtype=torch.int32),
        "adjust_bias": torch.zeros(1),
    }
