"""What a model takes on a given machine, for several numbers of ranks; nothing is loaded.

    fxlm plan MODEL --hardware 8xh100-nvlink --tensor-parallel-size 1,2,4,8

Here: files that describe hardware, and the table. The numbers of the model come from the graphs
of its ranks, those of the machine from its file. Not here: planning for the machine at hand
(``memory``).

The floor of a decode step is the time in which a rank reads each of its weights once and sends
what one token costs (ring algorithms, one latency a collective). A mixture of experts reads fewer
weights at batch 1, and all of them at large batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec

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
    """One line of the table; all numbers are those of one rank.

    Attributes:
        ranks: that share each layer.
        weights_bytes: prepared weights.
        kv_bytes_per_token: in all layers.
        sent_bytes_per_token: by one rank, for a token whose logits are needed.
        step_floor_s: see the module.
        tokens: that the KV memory holds, of all sequences together.
        refusal: why it cannot be; the other numbers are then 0.
    """

    ranks: int
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
        return msgspec.json.decode(path.read_bytes(), type=Hardware)
    except OSError:
        reason = f"give a JSON file, or one of {', '.join(hardware_names())}"
        raise InvalidOption("--hardware", choice, reason) from None
    except msgspec.MsgspecError as error:
        raise InvalidOption("--hardware", choice, str(error)) from None


def plan_ranks(
    options: EngineOptions, hardware: Hardware, sizes: Sequence[int],
    report: Callable[[str, float], None] | None = None,
) -> list[RankPlan]:  # fmt: skip
    """A plan for each number of ranks; the last rank's part is the largest or as large.

    Args:
        options: of the engine; its own number of ranks does not count.
        hardware: see `read_hardware`.
        sizes: numbers of ranks.
        report: see `compile_for`.
    """
    plans = []
    for size in sizes:
        chosen = replace(
            options, enforce_eager=True, tensor_parallel_size=size,
            sequence_parallel=options.sequence_parallel and size > 1,
        )  # fmt: skip
        if not hardware.share(size):
            reason = f"{hardware.name} has {hardware.devices} devices"
            plans.append(RankPlan(ranks=size, refusal=reason))
            continue
        try:
            artifact = compile_for(chosen, report=report).artifact
        except PassError as error:
            plans.append(RankPlan(ranks=size, refusal=str(error)))
            continue
        plans.append(_plan(artifact, hardware, size, options))
    return plans


def _plan(artifact: Artifact, hardware: Hardware, ranks: int, options: EngineOptions) -> RankPlan:
    sent: dict[str, int] = artifact.manifest["communication"]
    weights, per_token = weight_bytes(artifact), cache_bytes_per_token(artifact)
    bytes_sent = sent["per_token"] + sent["per_row"]
    share = hardware.share(ranks)
    batched = options.max_num_batched_tokens or (512 if hardware.kind == "cpu" else 2048)
    fixed = weights + activation_bytes(artifact, batched, options.max_num_seqs) + OVERHEAD_BYTES
    free = hardware.memory_bytes * share * options.memory_fraction - fixed
    floor = weights / (hardware.read_bytes_per_s * share)
    floor += bytes_sent / hardware.link_bytes_per_s + sent["count"] * hardware.link_latency_s
    return RankPlan(
        ranks=ranks, weights_bytes=weights, kv_bytes_per_token=per_token,
        sent_bytes_per_token=bytes_sent, step_floor_s=floor,
        tokens=max(int(free // per_token), 0),
        refusal="" if free > 0 else f"{fixed / GIB:.1f} GiB a rank do not fit",
    )  # fmt: skip


def table(hardware: Hardware, plans: Sequence[RankPlan], longest: int) -> list[str]:
    """The plans as text.

    Args:
        hardware: of the plans.
        plans: one a line.
        longest: context that the model was made for.
    """
    lines = [
        f"{hardware.name}: {hardware.about}",
        f"{'ranks':>5} {'weights':>11} {'KV a token':>12} {'sent a token':>13} "
        f"{'step floor':>11}   context x sequences, at most",
    ]
    for plan in plans:
        if plan.refusal:
            lines.append(f"{plan.ranks:>5} cannot be: {plan.refusal}")
            continue
        lines.append(
            f"{plan.ranks:>5} {plan.weights_bytes / GIB:>7.2f} GiB {plan.kv_bytes_per_token:>10} B "
            f"{plan.sent_bytes_per_token:>11} B {plan.step_floor_s * 1e3:>8.2f} ms   "
            + _contexts(plan.tokens, longest)
        )
    return lines


def _contexts(tokens: int, longest: int) -> str:
    lengths = [n for n in CONTEXTS if n < longest] + [longest]
    held = [(n, tokens // n) for n in lengths]
    shown = [f"{n} x {count}" for n, count in held if count]
    return ", ".join(shown) or f"{tokens} tokens, less than one sequence of {lengths[0]}"
