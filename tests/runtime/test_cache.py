"""The cache of artifacts: what differs, which is nearest, and what is taken as it is."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fxlm.compiler.artifact import MANIFEST, Artifact, open_artifact, writing
from fxlm.compiler.errors import ArtifactError
from fxlm.compiler.options import CompileOptions
from fxlm.models.checkpoint import Checkpoint, open_checkpoint
from fxlm.runtime import launch
from fxlm.runtime.cache import (
    Miss,
    differences,
    explain,
    flatten,
    look_up,
    nearest,
    open_frozen,
    target_of,
)
from fxlm.runtime.compile import compile_for, compile_model
from fxlm.runtime.options import EngineOptions
from fxlm.server.cli import main

OPTIONS = CompileOptions(eager=True)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("bundled-draft")


@pytest.fixture(scope="module")
def cache(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds one artifact."""
    root = tmp_path_factory.mktemp("cache")
    compile_model(checkpoint, OPTIONS, cache_dir=root)
    return root


def only(cache: Path) -> Path:
    (path,) = (p for p in (cache / "artifacts").iterdir() if p.is_dir())
    return path


def test_factors_have_names() -> None:
    factors = {"dtype": "float32", "versions": {"torch": "2"}, "passes": [
        {"name": "one", "source": "aa"}, {"name": "two", "source": "bb"}]}  # fmt: skip
    assert flatten(factors) == {
        "dtype": "float32", "versions.torch": "2", "passes": "one two",
        "passes.one.source": "aa", "passes.two.source": "bb",
    }  # fmt: skip


def test_differences_are_those_factors_alone() -> None:
    ours: dict[str, Any] = {"dtype": "float32", "versions": {"torch": "2.13", "triton": ""}}
    theirs = {"dtype": "float32", "versions": {"torch": "2.12", "triton": ""}}
    (found,) = differences(ours, theirs)
    assert str(found) == "versions.torch: 2.13 here, 2.12 there"
    assert differences(ours, ours) == []


def test_what_is_there_is_found(checkpoint: Checkpoint, cache: Path) -> None:
    assert isinstance(look_up(target_of(checkpoint, OPTIONS, cache)), Artifact)


def test_a_miss_names_what_changed(checkpoint: Checkpoint, cache: Path) -> None:
    found = look_up(target_of(checkpoint, replace(OPTIONS, block_size=32), cache))
    assert isinstance(found, Miss)
    assert found.kind == "changed"
    assert found.text.endswith("in block_size")


def test_a_miss_in_an_empty_cache(checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = look_up(target_of(checkpoint, OPTIONS, tmp_path))
    assert isinstance(found, Miss)
    assert found.kind == "absent"


def test_damage_is_told(checkpoint: Checkpoint, cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache / "artifacts", tmp_path / "artifacts")
    (only(tmp_path) / "load.json").write_text("{}")
    found = look_up(target_of(checkpoint, OPTIONS, tmp_path))
    assert isinstance(found, Miss)
    assert found.kind == "damaged"
    assert "load.json" in found.text


def test_the_nearest_differs_least(checkpoint: Checkpoint, cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache / "artifacts", tmp_path / "artifacts")
    far = tmp_path / "artifacts" / "far"
    shutil.copytree(only(cache), far)
    manifest = json.loads((far / MANIFEST).read_text())
    manifest["factors"] |= {"dtype": "float16", "source": "another"}
    (far / MANIFEST).write_text(json.dumps(manifest))
    (tmp_path / "artifacts" / "broken").mkdir()
    (tmp_path / "artifacts" / "broken" / MANIFEST).write_text("[]")
    target = target_of(checkpoint, replace(OPTIONS, block_size=32), tmp_path)
    found = nearest(tmp_path / "artifacts", target.factors)
    assert found is not None
    assert found[0].name == only(cache).name
    assert [difference.name for difference in found[1]] == ["block_size"]


def test_another_model_is_not_near(cache: Path) -> None:
    other = target_of(open_checkpoint("bundled"), OPTIONS, cache)
    assert nearest(cache / "artifacts", other.factors) is None


def test_explained_line_by_line(checkpoint: Checkpoint, cache: Path) -> None:
    found = explain(target_of(checkpoint, OPTIONS, cache), cache)
    assert any(line.startswith("versions.torch ") for line in found)
    assert found[-1].startswith("state ")
    missed = explain(target_of(checkpoint, replace(OPTIONS, block_size=32), cache), cache)
    assert missed[-1] == "  block_size: 32 here, 16 there"


def test_the_command_prints_it(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--cache-dir", str(cache), "--block-size", "32", "--enforce-eager"]
    assert main(["explain-cache", "bundled-draft", *flags]) == 0
    assert "block_size: 32 here, 16 there" in capsys.readouterr().out


# ---- frozen ----------------------------------------------------------------------------------


def test_a_frozen_artifact_is_taken_from_anywhere(cache: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(only(cache), tmp_path / "moved")
    empty = tmp_path / "empty"
    options = EngineOptions(
        model="bundled-draft", enforce_eager=True, frozen=str(moved), cache_dir=str(empty)
    )
    assert compile_for(options).artifact.path == moved
    assert not empty.exists()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (replace(OPTIONS, block_size=32), "block_size"),
        (replace(OPTIONS, disabled=("fuse_qkv",)), "passes"),
        (CompileOptions(eager=True, dtype="float32"), "dtype"),
        (CompileOptions(), "eager"),
    ],
)
def test_a_frozen_artifact_of_other_options_is_refused(
    checkpoint: Checkpoint, cache: Path, options: CompileOptions, names: str
) -> None:
    with pytest.raises(ArtifactError, match=rf"--frozen compiles nothing \(.*{names}"):
        open_frozen(only(cache), target_of(checkpoint, options, cache))


def test_a_frozen_artifact_of_another_model_is_refused(cache: Path) -> None:
    with pytest.raises(ArtifactError, match="checkpoint"):
        open_frozen(only(cache), target_of(open_checkpoint("bundled"), OPTIONS, cache))


@pytest.mark.parametrize("part", ["stat", "open"])
def test_an_artifact_that_cannot_be_read_is_a_miss(
    checkpoint: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    target = target_of(checkpoint, OPTIONS, cache)
    plain = getattr(Path, part)

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:  # root may read everything
        if self.name == MANIFEST:
            raise PermissionError(13, "Permission denied", str(self))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Path, part, refuse)
    found = look_up(target)
    assert isinstance(found, Miss)
    assert found.kind == "damaged"
    assert "cannot be read: Permission denied" in found.text


def test_a_manifest_without_its_keys_is_a_miss(
    checkpoint: Checkpoint, cache: Path, tmp_path: Path
) -> None:
    shutil.copytree(cache / "artifacts", tmp_path / "artifacts")
    manifest = only(tmp_path) / MANIFEST
    content = json.loads(manifest.read_text())
    del content["key"]
    manifest.write_text(json.dumps({**content, "files": {}}))
    found = look_up(target_of(checkpoint, OPTIONS, tmp_path))
    assert isinstance(found, Miss)
    assert found.kind == "damaged"


@pytest.mark.parametrize("damage", ["load.json", MANIFEST])
def test_a_damaged_frozen_artifact_is_refused(
    checkpoint: Checkpoint, cache: Path, tmp_path: Path, damage: str
) -> None:
    moved = shutil.copytree(only(cache), tmp_path / "moved")
    (moved / damage).write_text("{")
    with pytest.raises(ArtifactError, match="is damaged"):
        open_frozen(moved, target_of(checkpoint, OPTIONS, cache))


def test_what_is_no_artifact_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is no artifact"):
        open_frozen(tmp_path, target_of(checkpoint, OPTIONS, tmp_path))


def test_a_machine_without_a_compiler_takes_a_frozen_artifact(
    checkpoint: Checkpoint, cache: Path
) -> None:
    target = target_of(checkpoint, OPTIONS, cache)
    device = {**target.factors["device"], "compiler": ""}
    bare = replace(target, factors={**target.factors, "device": device})
    assert open_frozen(only(cache), bare).path == only(cache)


def test_a_read_only_share_is_read(
    checkpoint: Checkpoint, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(cache / "artifacts", tmp_path / "artifacts")
    monkeypatch.setattr(Path, "open", _refuse_to_write(Path.open))
    assert compile_model(checkpoint, OPTIONS, cache_dir=tmp_path).cached


def _refuse_to_write(opened: Any) -> Any:
    """A read-only file system, which root cannot be shown by permissions."""

    def open_only_to_read(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wax+"):
            raise OSError(30, "Read-only file system", str(self))
        return opened(self, mode, *args, **kwargs)

    return open_only_to_read


def test_what_a_killed_process_left_is_removed(cache: Path, tmp_path: Path) -> None:
    left = tmp_path / ".key.abc"
    left.mkdir()
    (left / "half").write_text("")
    with writing(tmp_path / "key") as work:
        shutil.copytree(only(cache), work, dirs_exist_ok=True)
    assert not left.exists()
    assert open_artifact(tmp_path / "key")


def test_the_launcher_knows_the_flags(cache: Path) -> None:
    from fxlm.server.cli import parse

    args = parse(["serve", "bundled-draft", "--frozen", str(only(cache)), "--no-tiered-start"])
    options = launch.engine_options(args)
    assert options.frozen == str(only(cache))
    assert not options.tiered_start
    assert launch.engine_options(parse(["serve", "bundled-draft"])).tiered_start
    assert not launch.engine_options(parse(["serve", "bundled-draft", "-tp", "2"])).tiered_start
