"""Ranks as actors of Ray: the tokens of one rank; an actor that is killed; Ray that is missing."""

from __future__ import annotations

import os
import select
import signal
import sys
from pathlib import Path

import pytest

from fxlm.compiler.errors import EngineDead, InvalidOption
from fxlm.models.tiny import write_checkpoint
from fxlm.runtime.check import generate
from fxlm.runtime.parallel.actors import start_actors, tcp_store
from fxlm.runtime.parallel.member import open_store
from tests.runtime.parallel.test_engine import GIVEN, GREEDY, engine, options, ranks_of


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray", "ignore::FutureWarning:ray")
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves its processes' pipes open
def test_an_engine_over_actors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'fxlm[ray]'")
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps a token there
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.init(address="local", num_cpus=1, include_dashboard=False, _node_ip_address="127.0.0.1")
    model = write_checkpoint("llama", tmp_path / "llama")
    expected = generate(engine(model), GIVEN, GREEDY)
    made = engine(model, tensor_parallel_size=2, distributed_executor_backend="ray")
    assert generate(made, GIVEN, GREEDY) == expected
    pid = ranks_of(made).pids[1]
    os.kill(pid, signal.SIGKILL)
    assert select.select([ranks_of(made)], [], [], 20)[0]
    assert "rank 1 (actor) was lost: The actor died" in str(made.trouble())
    with pytest.raises(EngineDead, match="rank 1"):
        generate(made, GIVEN, GREEDY)
    ranks_of(made).close()
    ray.shutdown()


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InvalidOption, match=r"pip install 'fxlm\[ray\]'"):
        start_actors(options("nowhere"), 2, 5.0)


def test_a_store_for_several_machines() -> None:
    address, server = tcp_store("127.0.0.1")
    open_store(address, 2).set("key", "value")
    assert server.get("key") == b"value"
