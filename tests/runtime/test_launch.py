"""launch: what the commands do, called as a user calls them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fxlm.runtime import launch, machine
from fxlm.runtime.options import from_mapping
from fxlm.runtime.worker import set_threads
from fxlm.server import cli

DRAFT = "bundled-draft"


def test_quantize_names_its_own_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["quantize", DRAFT, "--scheme", "int9", "--output", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert "--scheme='int9'" in capsys.readouterr().err


def test_compile_makes_the_artifact_of_every_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compile", DRAFT, "-tp", "2", "--enforce-eager", "--cache-dir", str(tmp_path)]
    assert cli.main(command) == 0
    assert "rank 1: " in capsys.readouterr().out
    assert len(list(tmp_path.glob("artifacts/*/manifest.json"))) == 2


def test_several_ranks_have_no_single_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compile", DRAFT, "-tp", "2", "--enforce-eager", "--output", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert "--output" in capsys.readouterr().err


def test_more_threads_than_cores_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(machine, "num_cores", lambda: (before, "cores of the CPU affinity"))
    try:
        with caplog.at_level(logging.WARNING):
            assert set_threads(before + 1)[0] == before + 1
    finally:
        torch.set_num_threads(before)
    assert f"give at most {before}" in caplog.text


@pytest.mark.parametrize(
    ("cores", "small", "options", "expected"),
    [
        (4, 1 << 40, {}, True), (4, 0, {}, False), (1, 1 << 40, {}, False),
        (4, 1 << 40, {"threads": 4}, False), (4, 1 << 40, {"tensor_parallel_size": 2}, False),
    ],
)  # fmt: skip
def test_a_server_of_a_small_model_leaves_itself_a_core(
    cores: int, small: int, options: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "num_cores", lambda: (cores, "cores of the CPU affinity"))
    monkeypatch.setattr(launch, "SMALL_BYTES", small)
    assert launch.leaves_core(from_mapping({"model": DRAFT, **options})) is expected
