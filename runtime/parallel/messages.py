"""What rank 0 and the others tell each other; msgpack, never pickle.

Here: the messages and how the tensors of a step cross. Not here: sockets (``channel``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch

from fxlm.runtime.step import WorkerSpec


class RankSpec(msgspec.Struct, kw_only=True):
    """What a rank is told when it is started, as one line of JSON on its standard input.

    Args:
        rank: of all ranks of the engine.
        options: of the engine, plain values.
        store: ``file:PATH`` or ``tcp:HOST:PORT`` of the store where groups meet.
        orders, news: endpoints of rank 0 to read from and to write to.
        orders_key, news_key: their CURVE keys; "" for Unix sockets.
        parent_pid: whose child it is; 0 if it is nobody's.
        paths: put in front of ``sys.path``.
        local_rank, local_ranks: which of this machine's ranks it is, and how many there are.
        host: address of this rank for the others.
    """

    rank: int
    options: dict[str, Any]
    store: str
    orders: str
    news: str
    orders_key: str = ""
    news_key: str = ""
    parent_pid: int = 0
    paths: list[str] = msgspec.field(default_factory=list)
    local_rank: int = 0
    local_ranks: int = 1
    host: str = "127.0.0.1"


# --- from rank 0


class Find(msgspec.Struct, tag=True, frozen=True):
    """The artifacts of all ranks are made, where this machine can see them: find yours."""


class Load(msgspec.Struct, tag=True, frozen=True):
    """Allocate a worker of these sizes and load the weights."""

    spec: dict[str, int]


class Join(msgspec.Struct, tag=True, frozen=True):
    """Every rank has loaded: meet in the groups."""


class Run(msgspec.Struct, tag=True, frozen=True):
    """Run a step; the tensors follow, a frame each: name, dtype and shape."""

    tensors: list[tuple[str, str, list[int]]]


class Copy(msgspec.Struct, tag=True, frozen=True):
    """Copy blocks (source, destination)."""

    pairs: list[tuple[int, int]]


class Leave(msgspec.Struct, tag=True, frozen=True):
    """End."""


Order = Find | Load | Join | Run | Copy | Leave


# --- to rank 0


class Planned(msgspec.Struct, tag=True, frozen=True):
    """The artifact is there; sizes that this rank has memory for."""

    rank: int
    pid: int
    spec: dict[str, int]


class Loaded(msgspec.Struct, tag=True, frozen=True):
    """The weights are there."""

    rank: int


class Joined(msgspec.Struct, tag=True, frozen=True):
    """The groups are there: ready for steps."""

    rank: int


class Pulse(msgspec.Struct, tag=True, frozen=True):
    """The rank lives."""

    rank: int


class Lost(msgspec.Struct, tag=True, frozen=True):
    """The rank ends, with the reason; ``first`` if it did not merely lose the others."""

    rank: int
    reason: str
    first: bool


News = Planned | Loaded | Joined | Pulse | Lost

_orders: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_news: msgspec.msgpack.Decoder[News] = msgspec.msgpack.Decoder(News)
encode = msgspec.msgpack.encode
decode_news = _news.decode


def pack_step(tensors: Mapping[str, torch.Tensor]) -> list[bytes]:
    """The frames of a step: the message, then the bytes of each tensor (CPU, contiguous)."""
    kinds = [
        (name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()
    ]
    return [
        encode(Run(kinds)),
        *(t.contiguous().numpy().tobytes() for t in tensors.values()),
    ]


def unpack(frames: Sequence[bytes]) -> tuple[Order, dict[str, torch.Tensor]]:
    """An order, and the tensors that came with it."""
    order = _orders.decode(frames[0])
    tensors = {}
    if isinstance(order, Run):
        for (name, kind, shape), frame in zip(order.tensors, frames[1:], strict=True):
            flat = torch.frombuffer(bytearray(frame), dtype=getattr(torch, kind))
            tensors[name] = flat.view(shape)
    return order, tensors


def merged_spec(specs: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The sizes that every rank has memory for."""
    return {name: min(spec[name] for spec in specs) for name in specs[0]}


def spec_values(spec: WorkerSpec) -> dict[str, int]:
    """The sizes of a `WorkerSpec`; points, which one rank alone can have, are left out."""
    import dataclasses

    every = dataclasses.asdict(spec)
    return {name: value for name, value in every.items() if isinstance(value, int)}


def spec_of(values: Mapping[str, int]) -> WorkerSpec:
    """The `WorkerSpec` of these sizes."""
    sizes: dict[str, Any] = dict(values)
    return WorkerSpec(**sizes)
