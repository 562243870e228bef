"""Prepared weights against their checksums, beside the engine."""

import json
import os
import threading
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fxlm.runtime import integrity


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    made = {"a": torch.arange(600_000.0), "b": torch.zeros(0), "c": torch.ones(3)}
    save_file(made, path)
    sums = {name: zlib.crc32(value.numpy().tobytes()) for name, value in made.items()}
    integrity.note_file(path).write_text(json.dumps({"stamp": [], "crc32": sums}))
    return path


def rot(path: Path) -> None:
    """Change one bit, and neither size nor time of modification."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_whole_file_has_no_damage(weights: Path) -> None:
    assert integrity.find_damage(weights) is None


def test_one_bit_is_seen(weights: Path) -> None:
    rot(weights)
    assert integrity.find_damage(weights) == "a does not have its checksum"


def told(path: Path) -> str | None:
    states: list[str] = []
    heard = threading.Event()
    integrity.watch(path, lambda state: (states.append(state), heard.set()), delay_s=0)  # type: ignore[func-returns-value]
    heard.wait(60)
    return states[0] if states else None


def test_a_whole_file_is_told_of(weights: Path) -> None:
    assert told(weights) == "whole"


def test_damage_is_told_and_the_next_start_prepares_anew(
    weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rot(weights)
    assert told(weights) == "damaged"
    assert "a does not have its checksum" in caplog.text
    assert not integrity.note_file(weights).exists()  # `prepared` takes no file without a note


def test_a_file_that_went_is_no_damage(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights.unlink()
    monkeypatch.setattr(integrity.sys, "argv", ["", str(weights), "0"])
    monkeypatch.setattr(integrity, "step_aside", lambda: None)
    monkeypatch.setattr(integrity, "signal_at_the_end_of_our_parent", lambda number: None)
    assert integrity.main() == 2
