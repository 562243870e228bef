"""Who starts the ranks of an engine, and what torchrun says of this process.

Here: the choice behind ``--distributed-executor-backend``, and torchrun's variables, which are its
interface; nothing else reads them. Imports no torch. Not here: starting (``start``, ``torchrun``,
``actors``).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from fxlm.compiler.errors import InvalidOption
from fxlm.runtime.options import EngineOptions

Backend = Literal["mp", "ray", "external_launcher"]

OPTION = "distributed_executor_backend"
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Torchrun:
    """What torchrun told this process.

    Attributes:
        rank, size: of this process, among all.
        local_rank, local_size: the same among those of this machine.
        node: number of this machine.
        host, port: of the store where all meet.
        attempt: how often the processes were started again.
        agent_store: torchrun serves the store itself; otherwise rank 0 has to.
    """

    rank: int
    size: int
    local_rank: int = 0
    local_size: int = 1
    node: int = 0
    host: str = "127.0.0.1"
    port: int = 29500
    attempt: int = 0
    agent_store: bool = False


def num_ranks(options: EngineOptions) -> int:
    """Ranks in all."""
    return options.tensor_parallel_size * options.pipeline_parallel_size


def choose_backend(options: EngineOptions) -> tuple[Backend, str]:
    """Who starts the ranks, and why."""
    chosen = options.distributed_executor_backend
    if chosen != "auto":
        return chosen, "asked for"
    if started_by_torchrun():
        return "external_launcher", "torchrun started this process"
    return "mp", "processes of this machine"


def started_by_torchrun() -> bool:
    """Whether torchrun itself, not only something that sets RANK, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and all(name in os.environ for name in VARIABLES)


def torchrun_process(size: int) -> Torchrun:
    """What torchrun told this process.

    Raises:
        InvalidOption: it told nothing, or started another number of processes than ``size``.
    """
    found = os.environ
    missing = [name for name in VARIABLES if name not in found]
    if missing:
        reason = f"{', '.join(missing)} is not set; start the command by torchrun"
        raise InvalidOption(OPTION, "external_launcher", reason)
    world = int(found["WORLD_SIZE"])
    if world != size:
        reason = (f"torchrun started {world} processes, and tensor_parallel_size x "
                  f"pipeline_parallel_size asks for {size} ranks; make them equal")  # fmt: skip
        raise InvalidOption(OPTION, "external_launcher", reason)
    return Torchrun(
        rank=int(found["RANK"]),
        size=world,
        local_rank=int(found.get("LOCAL_RANK", 0)),
        local_size=int(found.get("LOCAL_WORLD_SIZE", 1)),
        node=int(found.get("GROUP_RANK", found["RANK"])),
        host=found["MASTER_ADDR"],
        port=int(found["MASTER_PORT"]),
        attempt=int(found.get("TORCHELASTIC_RESTART_COUNT", 0)),
        agent_store=found.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )
