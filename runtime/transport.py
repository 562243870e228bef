"""The socket between the engine process and its parent.

Here: the address, the private directory it lies in, and what the process is told to build. Not
here: messages (``messages``) and loops (``service``, ``client``).

One DEALER socket each: the parent binds, the process connects. The address is a Unix socket in a
directory that only this user can enter. Where that is impossible (paths are at most 107 bytes)
it is a TCP port of the loopback device; any local user could connect to that one, so it is
encrypted with CURVE, whose keys only the process is told.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import zmq

MAX_IPC_PATH = 100  # bytes; sockaddr_un holds 107

S = TypeVar("S", bound="zmq.Socket[Any]")


class ServiceSpec(msgspec.Struct, kw_only=True):
    """What the engine process is told on its standard input.

    Args:
        factory: ``module:function`` that gives an `Engine`.
        kwargs: its keyword arguments: plain values only.
        endpoint: where to connect.
        parent_pid: whose child it is.
        paths: put in front of ``sys.path``.
        server_key: CURVE key of the parent; "" for a Unix socket.
    """

    factory: str
    kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    endpoint: str = ""
    parent_pid: int = 0
    paths: list[str] = msgspec.field(default_factory=list)
    server_key: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where a parent listens."""

    endpoint: str
    server_key: str


@contextlib.contextmanager
def listening(socket: S, host: str | None = None) -> Iterator[Address]:
    """Bind ``socket`` to a private address; it is gone afterwards.

    Args:
        socket: not bound yet.
        host: address of this machine for others to connect to; None: nobody else needs to.
    """
    if host is not None:
        yield _bind_tcp(socket, host)
        return
    directory = tempfile.mkdtemp(prefix="fxlm-")  # mode 0700
    try:
        path = os.path.join(directory, "engine")
        if zmq.has("ipc") and len(os.fsencode(path)) <= MAX_IPC_PATH:
            socket.bind(f"ipc://{path}")
            yield Address(endpoint=f"ipc://{path}", server_key="")
        else:
            yield _bind_tcp(socket)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _bind_tcp(socket: S, host: str = "127.0.0.1") -> Address:
    assert zmq.has("curve"), "no private Unix socket, and this libzmq cannot encrypt TCP"
    public, secret = zmq.curve_keypair()
    socket.curve_secretkey = secret
    socket.curve_publickey = public
    socket.curve_server = True
    port = socket.bind_to_random_port(f"tcp://{host}")
    return Address(endpoint=f"tcp://{host}:{port}", server_key=public.decode())


def connect(context: "zmq.Context[zmq.Socket[bytes]]", spec: ServiceSpec) -> "zmq.Socket[bytes]":
    """The engine's end."""
    socket = context.socket(zmq.DEALER)
    unlimited(socket)
    if spec.server_key:
        public, secret = zmq.curve_keypair()
        socket.curve_secretkey = secret
        socket.curve_publickey = public
        socket.curve_serverkey = spec.server_key.encode()
    socket.connect(spec.endpoint)
    return socket


def unlimited(socket: S) -> None:
    """Queue instead of blocking or dropping: the server bounds the number of requests."""
    socket.sndhwm = 0
    socket.rcvhwm = 0
