"""Ranks as actors of a Ray cluster.

Here: room for them, their start, their end. Only short JSON texts go through Ray; orders, steps and
collectives take the ways of every other rank. Not here: what a rank does (``rank``).

Rank 0 is the engine's own process, outside of Ray's book-keeping. A cluster that is there already
(``RAY_ADDRESS``, or one that was started on this machine) is used; otherwise one is made for this
engine alone, on loopback, and ends with it.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import os
import re
import signal
import socket
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from torch._C import _distributed_c10d as c10d

from fxlm.compiler.errors import InvalidOption
from fxlm.runtime.options import EngineOptions, resolve_device
from fxlm.runtime.parallel.choice import OPTION
from fxlm.runtime.parallel.group import LOOPBACK
from fxlm.runtime.parallel.messages import RankSpec
from fxlm.runtime.parallel.rank import serve
from fxlm.runtime.parallel.ranks import Handle, Ranks
from fxlm.runtime.parallel.start import Started, file_store, import_paths

ROOM_S = 60.0  # a cluster may have to start a machine
START_S = 120.0  # an actor's process imports torch
Module = Any  # Ray comes with the extra ``ray``


class Present(msgspec.Struct, frozen=True):
    """Where an actor is."""

    node: str
    host: str


class RankActor:
    """One rank; Ray makes an actor of this class."""

    def where(self) -> str:
        """Its machine, as JSON."""
        return here(import_ray())

    def serve(self, spec: str) -> int:
        """Run until told to leave; gives the exit code."""
        return serve(msgspec.json.decode(spec, type=RankSpec))


class _Actor:
    """A rank in an actor."""

    def __init__(self, ray: Module, actor: Any, spec: RankSpec) -> None:
        self._ray = ray
        self._actor = actor
        self._status = actor.serve.remote(msgspec.json.encode(spec).decode())
        self._ended: str | None = None

    def ended(self) -> str | None:
        """How the actor ended."""
        if self._ended is None:
            self._ended = self._how()
        return self._ended

    def _how(self) -> str | None:
        if not self._ray.is_initialized():
            return "ended together with Ray"
        if not self._ray.wait([self._status], timeout=0)[0]:
            return None
        try:
            return f"(actor) ended with status {self._ray.get(self._status)}"
        except self._ray.exceptions.RayError as error:
            text = " ".join(str(error).split())
            return f"(actor) was lost: {text.partition(' Some common causes')[0][:400]}"

    def kill(self) -> None:
        """End it at once."""
        if self._ray.is_initialized():
            self._ray.kill(self._actor)

    def close(self) -> None:
        """Let go of an actor that has ended; its process ends as well."""
        self.kill()


def start_actors(options: EngineOptions, size: int, silence_s: float) -> Started:
    """Start every rank but 0 as an actor.

    Raises:
        InvalidOption: Ray is not installed, or has no room for the actors.
    """
    ray = import_ray()
    ours = connect(ray, size - 1)
    group = None
    try:
        group = reserve(ray, options, size - 1)
        actors = make_actors(ray, options, group, size - 1)
        us = msgspec.json.decode(here(ray), type=Present)
        told = ray.get([actor.where.remote() for actor in actors], timeout=START_S)
    except BaseException:
        release(ray, group, ours)
        raise
    places = [us, *(msgspec.json.decode(text, type=Present) for text in told)]
    near = all(place.node == us.node for place in places)
    ranks = Ranks(size, silence_s, None if near else us.host)
    store, keep = (file_store(ranks), None) if near else tcp_store(us.host)
    count = Counter(place.node for place in places)
    handles: dict[int, Handle] = {}
    for rank, (actor, place) in enumerate(zip(actors, places[1:], strict=True), 1):
        spec = RankSpec(
            rank=rank, options=portable(options).as_json(), store=store,
            orders=ranks.orders.address.endpoint, orders_key=ranks.orders.address.server_key,
            news=ranks.inbox.address.endpoint, news_key=ranks.inbox.address.server_key,
            paths=import_paths(), local_ranks=count[place.node],
            host=LOOPBACK if near else place.host,
        )  # fmt: skip
        handles[rank] = _Actor(ray, actor, spec)
    ranks.watch(handles)
    started = Started(
        ranks=ranks, store=store, local_ranks=count[us.node],
        host=LOOPBACK if near else us.host, keep=keep,
        release=functools.partial(release, ray, group, ours),
    )  # fmt: skip
    atexit.register(started.close)  # before Ray's own end, which would come first otherwise
    return started


def import_ray() -> Module:
    """Ray.

    Raises:
        InvalidOption: it is not installed.
    """
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        reason = f"Ray does not import ({error}); pip install 'fxlm[ray]'"
        raise InvalidOption(OPTION, "ray", reason) from error


def connect(ray: Module, num_actors: int) -> bool:
    """Be a client of a cluster; gives whether it was made here, for this engine."""
    if ray.is_initialized():
        return False
    before = signal.getsignal(signal.SIGTERM)
    try:
        try:
            ray.init(address="auto", logging_level="warning")
            return False
        except ConnectionError:
            ray.init(
                address="local", num_cpus=num_actors, include_dashboard=False,
                logging_level="warning", _node_ip_address=LOOPBACK,
            )  # fmt: skip
            return True
    finally:  # Ray's handler would end the engine in the middle of its requests
        if signal.getsignal(signal.SIGTERM) is not before:
            signal.signal(signal.SIGTERM, before)


def reserve(ray: Module, options: EngineOptions, num_actors: int) -> Any:
    """Room for the actors, close together."""
    cuda = resolve_device(options.device)[0] == "cuda"
    need = {"CPU": 1.0, **({"GPU": 1.0} if cuda else {})}
    group = importlib.import_module("ray.util").placement_group([need] * num_actors, "PACK")
    if not group.wait(ROOM_S):
        free = {kind: ray.available_resources().get(kind, 0.0) for kind in need}
        reason = (f"the {num_actors} ranks beside rank 0 need {need} each, and Ray's cluster has "
                  f"{free} free, after {ROOM_S:.0f} s; use fewer ranks, or more nodes")  # fmt: skip
        importlib.import_module("ray.util").remove_placement_group(group)
        raise InvalidOption(OPTION, "ray", reason)
    return group


def make_actors(ray: Module, options: EngineOptions, group: Any, num_actors: int) -> list[Any]:
    """The actors, each in its part of the room."""
    strategies = importlib.import_module("ray.util.scheduling_strategies")
    cuda = resolve_device(options.device)[0] == "cuda"
    return [
        ray.remote(RankActor)
        .options(
            num_cpus=1, num_gpus=int(cuda), max_restarts=0,
            scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=index
            ),
        )
        .remote()
        for index in range(num_actors)
    ]  # fmt: skip


def release(ray: Module, group: Any, ours: bool) -> None:
    """Give back the room, and the cluster if it was made here."""
    if not ray.is_initialized():
        return
    if ours:
        ray.shutdown()
    elif group is not None:
        importlib.import_module("ray.util").remove_placement_group(group)


def here(ray: Module) -> str:
    """The machine of this process in the cluster, as JSON."""
    node = ray.get_runtime_context().get_node_id()
    host = importlib.import_module("ray.util").get_node_ip_address()
    return msgspec.json.encode(Present(node, host)).decode()


def tcp_store(host: str) -> tuple[str, c10d.Store]:
    """A store for ranks of several machines, on one address of this one; and its server."""
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    server = c10d.TCPStore(
        host, port, None, True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return f"tcp:{host}:{port}", server


def portable(options: EngineOptions) -> EngineOptions:
    """The same with whole paths: an actor has another current directory."""
    changes: dict[str, Any] = {}
    if Path(options.model).exists():
        changes["model"] = os.path.abspath(options.model)
    if options.cache_dir is not None:
        changes["cache_dir"] = os.path.abspath(options.cache_dir)
    passes = (re.sub(r"^[^:]+(?=:)", lambda m: os.path.abspath(m[0]), p) for p in options.passes)
    return replace(options, passes=tuple(passes), **changes)
