"""Who starts the ranks: the choice, and torchrun's variables."""

from __future__ import annotations

import pytest

from fxlm.compiler.errors import InvalidOption
from fxlm.runtime.options import EngineOptions
from fxlm.runtime.parallel.choice import VARIABLES, choose_backend, torchrun_process


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without torchrun."""
    for name in (*VARIABLES, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def say(environment: pytest.MonkeyPatch, **values: str) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"}
    for name, value in {**place, **values}.items():
        environment.setenv(name, value)


def test_processes_of_this_machine_are_the_default(alone: pytest.MonkeyPatch) -> None:
    assert choose_backend(EngineOptions())[0] == "mp"
    say(alone)  # others set RANK, too
    assert choose_backend(EngineOptions())[0] == "mp"


def test_torchrun_is_noticed(alone: pytest.MonkeyPatch) -> None:
    say(alone, TORCHELASTIC_RUN_ID="none")
    assert choose_backend(EngineOptions()) == (
        "external_launcher", "torchrun started this process"
    )  # fmt: skip


def test_what_is_asked_for_is_taken(alone: pytest.MonkeyPatch) -> None:
    say(alone, TORCHELASTIC_RUN_ID="none")
    assert choose_backend(EngineOptions(distributed_executor_backend="mp"))[0] == "mp"


def test_a_process_has_its_place_from_torchrun(alone: pytest.MonkeyPatch) -> None:
    say(alone, LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", GROUP_RANK="0",
        TORCHELASTIC_RESTART_COUNT="3", TORCHELASTIC_USE_AGENT_STORE="True")  # fmt: skip
    us = torchrun_process(4)
    assert (us.rank, us.size, us.local_rank, us.local_size, us.node) == (1, 4, 1, 2, 0)
    assert (us.host, us.port, us.attempt, us.agent_store) == ("10.0.0.1", 5, 3, True)


def test_another_number_of_processes_is_refused(alone: pytest.MonkeyPatch) -> None:
    say(alone)
    with pytest.raises(InvalidOption, match=r"started 4 processes.* asks for 2 ranks"):
        torchrun_process(2)


def test_without_torchrun_its_ranks_are_refused(alone: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidOption, match=r"RANK, WORLD_SIZE.* is not set; start"):
        torchrun_process(2)
