"""diff: what differs between two artifacts, in structure and in numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fxlm.compiler.artifact import Artifact, write_manifest
from fxlm.compiler.errors import InvalidOption
from fxlm.compiler.options import CompileOptions
from fxlm.models.checkpoint import Checkpoint, open_checkpoint
from fxlm.models.tiny import write_checkpoint
from fxlm.runtime.compile import compile_model
from fxlm.runtime.explain.diff import numbers, structure
from fxlm.server import cli
from tests.runtime.explain.faults import wrong_scale

Build = Callable[..., Artifact]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_checkpoint("llama", tmp_path_factory.mktemp("diff") / "model"))


@pytest.fixture(scope="module")
def build(checkpoint: Checkpoint) -> Build:
    def run(**more: Any) -> Artifact:
        options = CompileOptions(eager=True, dtype="float32", **more)
        return compile_model(checkpoint, options, cache_dir=checkpoint.path.parent).artifact

    return run


def test_an_artifact_equals_itself(build: Build, checkpoint: Checkpoint) -> None:
    assert structure(build(), build()) == []
    assert all(e.absolute == 0.0 for e in numbers(build(), build(), checkpoint).values())


def test_a_missing_pass_is_seen_in_passes_and_graphs(build: Build) -> None:
    lines = [c.line() for c in structure(build(), build(disabled=("fuse_qkv",)))]
    assert any(line.startswith("passes:") for line in lines)
    assert any("calls of aten.cat.default" in line for line in lines), lines
    weights = [line for line in lines if line.startswith("weight")]
    assert 1 <= len(weights) <= 4, weights  # a line a layout: two layers are no more than one


def test_the_same_passes_with_another_option(build: Build) -> None:
    changes = structure(build(), build(block_size=32))
    assert next(c for c in changes if c.what == "block_size").line() == "block_size: 16 -> 32"


def test_numbers_that_moved_fail_the_gate(
    build: Build, checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(build().path), str(build(passes=(wrong_scale,)).path)]
    model = ["--model", str(checkpoint.path)]
    assert cli.main(["diff", *paths, *model]) == 1
    assert "ABOVE the tolerance" in capsys.readouterr().out
    assert cli.main(["diff", *paths, *model, "--structure", "ignore"]) == 1
    assert cli.main(["diff", *paths, *model, "--structure", "ignore", "--tolerance", "100"]) == 0


def test_graphs_that_differ_have_a_status_of_their_own(
    build: Build, checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(build().path), str(build(disabled=("fuse_qkv",)).path)]
    assert cli.main(["diff", *paths]) == 3
    assert "numbers were not compared" in capsys.readouterr().out
    assert cli.main(["diff", *paths, "--model", str(checkpoint.path)]) == 3
    assert cli.main(["diff", *paths, "--structure", "ignore"]) == 0


def test_versions_and_options_alone_do_not_fail_the_gate(
    build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upgraded = tmp_path / "upgraded"
    shutil.copytree(build().path, upgraded)
    manifest = json.loads((upgraded / "manifest.json").read_text())
    (upgraded / "manifest.json").unlink()
    manifest["factors"]["versions"]["torch"] = "9.9"
    own = ("format", "files", "digest")
    write_manifest(upgraded, {k: v for k, v in manifest.items() if k not in own})
    assert cli.main(["diff", str(build().path), str(upgraded)]) == 0
    said = capsys.readouterr().out
    assert "-> 9.9" in said
    assert "1 differences of what went in, 0 of what came out" in said


def test_an_artifact_that_cannot_be_read_is_no_difference(build: Build, tmp_path: Path) -> None:
    assert cli.main(["diff", str(build().path), str(tmp_path)]) == 2


@pytest.mark.parametrize("text", ["nan", "-1"])
def test_a_tolerance_that_nothing_meets_is_refused(text: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["diff", "a", "b", "--tolerance", text])


def test_another_checkpoint_is_refused(build: Build, tmp_path: Path) -> None:
    other = open_checkpoint(write_checkpoint("llama", tmp_path / "other", num_hidden_layers=1))
    with pytest.raises(InvalidOption, match="made for another model"):
        numbers(build(), build(), other)
