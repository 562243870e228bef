"""Reports that are kept, and the process that makes the page of a server from them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fxlm.compiler.options import CompileOptions
from fxlm.models.checkpoint import Checkpoint, open_checkpoint
from fxlm.models.tiny import write_checkpoint
from fxlm.runtime import machine
from fxlm.runtime.explain import child, kept, report
from fxlm.runtime.explain.page import BESIDE, render
from fxlm.runtime.explain.report import Choices, explain


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_checkpoint("llama", tmp_path_factory.mktemp("kept") / "model"))


def test_a_report_is_of_one_model_and_its_options(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def place(**options: object) -> Path:
        return kept.place_of(checkpoint, CompileOptions(**options), tmp_path)  # type: ignore[arg-type]

    assert place() == place(eager=True)  # its graphs are the same
    assert place() != place(disabled=("fuse_qkv",))


def test_what_is_kept_is_read_and_the_oldest_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "MOST", 2)
    paths = [tmp_path / f"{n}.json" for n in range(3)]
    for n, path in enumerate(paths):
        kept.keep({"passes": [n]}, path)
        os.utime(path, (n, n))
    kept.keep({"passes": [2]}, paths[2])
    assert [kept.read(path) for path in paths] == [None, {"passes": [1]}, {"passes": [2]}]


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_damaged_report_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    assert kept.read(tmp_path / "report.json") is None


def test_the_page_of_a_server_is_made_once(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report.timing, "in_turns", lambda calls, clock: dict.fromkeys(calls, 1.0))
    options = {"model": str(checkpoint.path), "dtype": "float32", "cache_dir": str(tmp_path)}
    job = child.Job(options=options, output=str(tmp_path / "page.html"))
    child.build(job)
    page = (tmp_path / "page.html").read_text()
    for shown in ("How right it is", "What it costs", "What the machine allows", BESIDE):
        assert shown in page
    (tmp_path / "page.html").unlink()
    monkeypatch.setattr(report, "explain", None)  # to make it again would fail
    child.build(job)
    assert BESIDE in (tmp_path / "page.html").read_text()


def test_a_server_without_room_says_what_is_left_out(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory_available_bytes", lambda: checkpoint.num_bytes)
    made = explain(checkpoint, CompileOptions(), Choices(beside=True, limits=False))
    assert "errors" not in made["passes"][-1]
    assert made["model"]["layers_shown"] == made["model"]["num_layers"]
    assert "Errors and times are left out: they need" in render(json.loads(json.dumps(made)))
