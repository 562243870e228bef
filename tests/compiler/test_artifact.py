"""Artifacts: whole or refused, written at once or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fxlm.compiler import artifact
from fxlm.compiler.errors import ArtifactError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "one"
    with artifact.writing(target) as work:
        (work / "data.bin").write_bytes(b"1234")
        artifact.write_manifest(work, {"key": "k", "compiled": False})
    return target


def test_opens(path: Path) -> None:
    found = artifact.open_artifact(path)
    assert (found.key, found.nbytes) == ("k", 4)


def test_moves(path: Path, tmp_path: Path) -> None:
    moved = path.rename(tmp_path / "two")
    assert artifact.open_artifact(moved).key == "k"


@pytest.mark.parametrize("content", [b"1235", b"12345", b""])
def test_damage_is_found(path: Path, content: bytes) -> None:
    (path / "data.bin").write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged"):
        artifact.open_artifact(path)


def test_a_missing_file_is_named(path: Path) -> None:
    (path / "data.bin").unlink()
    with pytest.raises(ArtifactError, match=r"lacks data\.bin"):
        artifact.open_artifact(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"key": "k"', '"key": "l"'), ('"key": "k",', ""), ('"data.bin"', '"data.bon"')],
)
def test_a_manifest_of_other_content_is_damaged(path: Path, old: str, new: str) -> None:
    manifest = path / artifact.MANIFEST
    assert old in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(old, new))
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        artifact.open_artifact(path)


def test_a_manifest_without_files_is_damaged(path: Path) -> None:
    manifest = path / artifact.MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "files": {}}))
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        artifact.open_artifact(path)


@pytest.mark.parametrize("name", [artifact.MANIFEST, "data.bin"])
def test_what_cannot_be_read_is_named(
    path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:  # root may read everything
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ArtifactError, match=f"{name} cannot be read: Permission denied"):
        artifact.open_artifact(path)


def test_another_format_is_refused(path: Path) -> None:
    manifest = path / artifact.MANIFEST
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 99'))
    with pytest.raises(ArtifactError, match="format 99"):
        artifact.open_artifact(path)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), artifact.writing(tmp_path / "one"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_new_one_replaces_the_old(path: Path) -> None:
    with artifact.writing(path) as work:
        artifact.write_manifest(work, {"key": "new", "compiled": False})
    assert artifact.open_artifact(path).key == "new"
    assert [p.name for p in path.parent.iterdir()] == ["one"]
