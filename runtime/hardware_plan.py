"""What a model takes on a given machine, for several numbers of ranks; nothing is loaded.

    fxlm plan MODEL --hardware 8xh100-nvlink --tensor-parallel-size 1,2,4,8
    fxlm plan MODEL --hardware 8xh100-nvlink -tp 1,2,4 --pipeline-parallel-size 1,2

Here: files that describe hardware, and the table. The numbers of the model come from the graphs
of its ranks, those of the machine from its file. Not here: planning for the machine at hand
(``memory``).

The floor of a decode step is the time in which a rank reads each of its weights once and sends
what one token costs (ring algorithms, one latency a collective). A sequence passes the stages one
after another, so theirs are added up, and what they hand on. A mixture of experts reads fewer
weights at batch 1, and all of them at large batches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec
import torch

from fxlm.compiler.artifact import Artifact
from fxlm.compiler.errors import InvalidOption, PassError
from fxlm.runtime.compile import compile_for
from fxlm.runtime.memory import (
    OVERHEAD_BYTES,
    activation_bytes,
    cache_bytes_per_token,
    weight_bytes,
)
from fxlm.runtime.options import EngineOptions

FOLDER = Path(__file__).parent / "hardware"
GIB = 1 << 30
CONTEXTS = (2048, 8192, 32768, 131072)

_Value = tuple[str, str, Sequence[Sequence[int]]]  # handed on: see `program.received`


class Hardware(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine, as its file says.

    Args:
        name: of the file.
        about: where the numbers come from.
        kind: ranks of a ``cpu`` share one device; each rank of ``cuda`` has its own.
        devices: how many there are.
        memory_bytes: of a device.
        read_bytes_per_s: memory bandwidth of a device.
        link_bytes_per_s: what a rank sends while it receives as much.
        link_latency_s: of one collective of a few bytes.
    """

    name: str
    about: str
    kind: Literal["cpu", "cuda"]
    devices: int
    memory_bytes: float
    read_bytes_per_s: float
    link_bytes_per_s: float
    link_latency_s: float

    def share(self, ranks: int) -> float:
        """Devices that one of ``ranks`` ranks has; 0 if there are not enough."""
        if self.kind == "cpu":
            return min(1.0, self.devices / ranks)
        return 1.0 if ranks <= self.devices else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlan:
    """One line of the table; numbers of one rank are those of the stage that has most.

    Attributes:
        ranks: that share each layer.
        stages: that the layers are cut into.
        weights_bytes: prepared weights of one rank.
        kv_bytes_per_token: in all layers of one rank.
        sent_bytes_per_token: by one rank, for a token whose logits are needed.
        step_floor_s: of all stages; see the module.
        tokens: that the KV memory holds, of all sequences together.
        refusal: why it cannot be; the other numbers are then 0.
    """

    ranks: int
    stages: int = 1
    weights_bytes: int = 0
    kv_bytes_per_token: int = 0
    sent_bytes_per_token: int = 0
    step_floor_s: float = 0.0
    tokens: int = 0
    refusal: str = ""


def hardware_names() -> list[str]:
    """Machines whose files come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read_hardware(choice: str) -> Hardware:
    """The machine of a file, or one that comes with the package, by name.

    Raises:
        InvalidOption: no such file, or a field of it is wrong.
    """
    path = FOLDER / f"{choice}.json" if choice in hardware_names() else Path(choice)
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Hardware)
    except OSError:
        reason = f"give a JSON file, or one of {', '.join(hardware_names())}"
        raise InvalidOption("--hardware", choice, reason) from None
    except msgspec.MsgspecError as error:
        raise InvalidOption("--hardware", choice, str(error)) from None
    for name in ("devices", "memory_bytes", "read_bytes_per_s", "link_bytes_per_s"):
        if not getattr(found, name) > 0:
            reason = f"{name} is {getattr(found, name)!r}, must be more than 0"
            raise InvalidOption("--hardware", choice, reason)
    return found


def plan_ranks(
    options: EngineOptions, hardware: Hardware, sizes: Sequence[int], stages: Sequence[int] = (1,),
    report: Callable[[str, float], None] | None = None,
) -> list[RankPlan]:  # fmt: skip
    """A plan for each number of stages and of ranks; no rank of a stage has more than its last.

    Args:
        options: of the engine; its own numbers of ranks and stages do not count.
        hardware: see `read_hardware`.
        sizes: numbers of ranks that share a layer.
        stages: numbers of stages.
        report: see `compile_for`.
    """
    plans = []
    for count, size in itertools.product(stages, sizes):
        if not hardware.share(size * count):
            reason = f"{hardware.name} has {hardware.devices} devices"
            plans.append(RankPlan(ranks=size, stages=count, refusal=reason))
            continue
        chosen = replace(
            options, enforce_eager=True, tensor_parallel_size=size, pipeline_parallel_size=count,
            sequence_parallel=options.sequence_parallel and size > 1,
        )  # fmt: skip
        try:
            parts = [
                compile_for(chosen, rank=stage * size, report=report).artifact
                for stage in range(count)
            ]
        except PassError as error:
            plans.append(RankPlan(ranks=size, stages=count, refusal=str(error)))
            continue
        following = [part.manifest["received"] for part in parts[1:]] + [[]]
        plans.append(_together([
            _plan(part, handed, hardware, size, count, options)
            for part, handed in zip(parts, following, strict=True)
        ]))  # fmt: skip
    return plans


def _together(parts: Sequence[RankPlan]) -> RankPlan:
    """One line for the stages."""
    return RankPlan(
        ranks=parts[0].ranks, stages=parts[0].stages,
        weights_bytes=max(p.weights_bytes for p in parts),
        kv_bytes_per_token=max(p.kv_bytes_per_token for p in parts),
        sent_bytes_per_token=max(p.sent_bytes_per_token for p in parts),
        step_floor_s=sum(p.step_floor_s for p in parts),
        tokens=min(p.tokens for p in parts),
        refusal=next((p.refusal for p in parts if p.refusal), ""),
    )  # fmt: skip


def _plan(
    artifact: Artifact, handed: Sequence[_Value], hardware: Hardware, ranks: int, stages: int,
    options: EngineOptions,
) -> RankPlan:  # fmt: skip
    """Of one stage, which hands on these values."""
    sent: dict[str, int] = artifact.manifest["communication"]
    weights, per_token = weight_bytes(artifact), cache_bytes_per_token(artifact)
    bytes_sent = sent["per_token"] + sent["per_row"] + sum(map(_bytes_per_token, handed))
    share = hardware.share(ranks * stages)
    batched = options.max_num_batched_tokens or (512 if hardware.kind == "cpu" else 2048)
    fixed = weights + activation_bytes(artifact, batched, options.max_num_seqs) + OVERHEAD_BYTES
    free = hardware.memory_bytes * share * options.memory_fraction - fixed
    floor = weights / (hardware.read_bytes_per_s * share)
    messages = sent["count"] + len(handed)
    floor += bytes_sent / hardware.link_bytes_per_s + messages * hardware.link_latency_s
    return RankPlan(
        ranks=ranks, stages=stages, weights_bytes=weights, kv_bytes_per_token=per_token,
        sent_bytes_per_token=bytes_sent, step_floor_s=floor,
        tokens=max(int(free // per_token), 0),
        refusal="" if free > 0 else f"{fixed / GIB:.1f} GiB a rank do not fit",
    )  # fmt: skip


def _bytes_per_token(value: _Value) -> int:
    _, kind, shape = value
    dtype: torch.dtype = getattr(torch, kind)
    sizes: list[float] = [1 / size if shared else size for size, shared in shape]
    return round(math.prod(sizes) * dtype.itemsize)


def table(hardware: Hardware, plans: Sequence[RankPlan], longest: int) -> list[str]:
    """The plans as text.

    Args:
        hardware: of the plans.
        plans: one a line.
        longest: context that the model was made for.
    """
    lines = [
        f"{hardware.name}: {hardware.about}",
        f"{'ranks':>5} {'stages':>6} {'weights':>11} {'KV a token':>12} {'sent a token':>13} "
        f"{'step floor':>11}   context x sequences, at most",
    ]
    for plan in plans:
        if plan.refusal:
            lines.append(f"{plan.ranks:>5} {plan.stages:>6} cannot be: {plan.refusal}")
            continue
        lines.append(
            f"{plan.ranks:>5} {plan.stages:>6} {plan.weights_bytes / GIB:>7.2f} GiB "
            f"{plan.kv_bytes_per_token:>10} B "
            f"{plan.sent_bytes_per_token:>11} B {plan.step_floor_s * 1e3:>8.2f} ms   "
            + _contexts(plan.tokens, longest)
        )
    return lines


def _contexts(tokens: int, longest: int) -> str:
    lengths = [n for n in CONTEXTS if n < longest] + [longest]
    held = [(n, tokens // n) for n in lengths]
    shown = [f"{n} x {count}" for n, count in held if count]
    return ", ".join(shown) or f"{tokens} tokens, less than one sequence of {lengths[0]}"
