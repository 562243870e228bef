"""Prepared weights on disk: written once, mapped afterwards, prepared anew where in doubt."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fxlm.compiler.artifact import Artifact, TensorSpec
from fxlm.compiler.options import CompileOptions
from fxlm.compiler.step import load_weights
from fxlm.models.checkpoint import Checkpoint, open_checkpoint
from fxlm.runtime import prepared
from fxlm.runtime.compile import compile_model
from tests.checkpoints import make_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Checkpoint]:
    """A model whose weights are packed, compiled as far as the graph."""
    folder = tmp_path_factory.mktemp("model")
    checkpoint = open_checkpoint(make_checkpoint("llama", folder / "llama"))
    options = CompileOptions(eager=True, dtype="float32", pack_weights=True)
    return compile_model(checkpoint, options, cache_dir=folder / "cache").artifact, checkpoint


@pytest.fixture(autouse=True)
def _every_size_on_an_empty_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "SMALLEST_BYTES", 0)
    monkeypatch.setattr(prepared.shutil, "disk_usage", lambda _: _Disk(total=1 << 40, free=1 << 40))


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix == ".safetensors"]


def test_the_second_start_maps_what_the_first_wrote(
    model: tuple[Artifact, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, how_first = prepared.load(*model, CPU, tmp_path)
    monkeypatch.setattr(prepared, "load_weights", None)  # packing again would fail
    second, how_second = prepared.load(*model, CPU, tmp_path)
    assert how_first.startswith("prepared, and kept in")
    assert how_second.startswith("mapped from")
    assert len(files(tmp_path)) == 1
    assert list(first) == list(second) == list(model[0].weights())


def test_mapped_weights_are_those_prepared_in_memory(
    model: tuple[Artifact, Checkpoint], tmp_path: Path
) -> None:
    mapped, _ = prepared.load(*model, CPU, tmp_path)
    for name, value in load_weights(*model, CPU).items():
        assert torch.equal(mapped[name], value), name
        assert mapped[name].stride() == value.stride(), name


def test_large_weights_are_aligned(model: tuple[Artifact, Checkpoint], tmp_path: Path) -> None:
    mapped, _ = prepared.load(*model, CPU, tmp_path)
    large = [v for v in mapped.values() if v.nbytes % prepared.ALIGNMENT == 0]
    assert len(large) > 5
    assert all(value.data_ptr() % prepared.ALIGNMENT == 0 for value in large)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty", "blocks", "note"])
def test_damage_is_prepared_anew(
    model: tuple[Artifact, Checkpoint], tmp_path: Path, damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    prepared.load(*model, CPU, tmp_path)
    (name,) = files(tmp_path)
    whole = (tmp_path / name).read_bytes()
    place = tmp_path / name if damage != "note" else (tmp_path / name).with_suffix(".json")
    changed = bytearray(whole)
    changed[-512:] = os.urandom(512)
    content = {
        "truncated": whole[:-4], "foreign": b"\2" + b"\0" * 7 + b"{}", "empty": b"",
        "blocks": bytes(changed), "note": b"{}",
    }[damage]  # fmt: skip
    place.write_bytes(content)
    again, how = prepared.load(*model, CPU, tmp_path)
    assert how.startswith("prepared, and kept in")
    assert "damaged" in caplog.text
    assert len(again) == len(model[0].weights())
    assert (tmp_path / name).read_bytes() == whole


def test_a_file_that_was_copied_is_checked_once(
    model: tuple[Artifact, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared.load(*model, CPU, tmp_path)
    (name,) = files(tmp_path)
    (tmp_path / name).touch()
    checked: list[int] = []
    sums = prepared.zlib.crc32
    monkeypatch.setattr(
        prepared.zlib, "crc32", lambda data: checked.append(len(data)) or sums(data)
    )  # type: ignore[func-returns-value]
    for _ in range(2):
        _, how = prepared.load(*model, CPU, tmp_path)
        assert how.startswith("mapped from")
        assert len(checked) == len(model[0].weights())


def test_another_file_of_weights_is_prepared_anew(
    model: tuple[Artifact, Checkpoint], tmp_path: Path
) -> None:
    artifact, checkpoint = model
    prepared.load(artifact, checkpoint, CPU, tmp_path)
    file = checkpoint.path / "model.safetensors"
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))  # written to, in whatever place
    _, how = prepared.load(artifact, open_checkpoint(checkpoint.path), CPU, tmp_path)
    assert how.startswith("prepared, and kept in")
    assert len(files(tmp_path)) == 2


def test_off_writes_nothing(model: tuple[Artifact, Checkpoint], tmp_path: Path) -> None:
    weights, how = prepared.load(*model, CPU, tmp_path, "off")
    assert how == "prepared in memory: --prepared-weights off"
    assert len(weights) == len(model[0].weights())
    assert files(tmp_path) == []


def test_small_models_are_not_kept(
    model: tuple[Artifact, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "SMALLEST_BYTES", 1 << 30)
    place = prepared.place_of(*model, tmp_path)
    assert place.path is None
    assert "MiB are prepared in no time" in place.reason


def test_a_folder_that_cannot_be_made_is_no_obstacle(
    model: tuple[Artifact, Checkpoint], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    weights, how = prepared.load(*model, CPU, tmp_path / "file" / "weights")
    assert "cannot be written" in how
    assert len(weights) == len(model[0].weights())


def test_a_failed_write_leaves_nothing_and_the_model_is_served(
    model: tuple[Artifact, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepared.os, "pwrite", full)
    weights, how = prepared.load(*model, CPU, tmp_path)
    assert "No space left" in how
    assert len(weights) == len(model[0].weights())
    assert files(tmp_path) == []


def test_room_is_made_by_the_longest_unused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for age, name in enumerate(("new", "middle", "old")):
        (tmp_path / f"{name}.safetensors").write_bytes(b"x" * 100)
        os.utime(tmp_path / f"{name}.safetensors", (1000 - age, 1000 - age))
    monkeypatch.setattr(prepared.shutil, "disk_usage", lambda _: _Disk(total=800, free=700))
    assert prepared.make_room(tmp_path, 100) == ""
    assert sorted(files(tmp_path)) == ["new.safetensors"]


class _Disk:
    def __init__(self, total: int, free: int) -> None:
        self.total, self.free = total, free


def test_a_full_disk_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared.shutil, "disk_usage", lambda _: _Disk(total=1000, free=150))
    assert "would stay free" in prepared.make_room(tmp_path, 100)
    assert "are more than" in prepared.make_room(tmp_path, 300)


@pytest.mark.parametrize(
    ("shape", "stride", "order"),
    [
        ((2, 3), (3, 1), [0, 1]),
        ((2, 3), (1, 2), [1, 0]),
        ((2, 3, 4), (4, 8, 1), [1, 0, 2]),
        ((2, 3), (4, 1), None),
        ((2, 3), (0, 1), None),
    ],
)
def test_order_in_memory(shape: Any, stride: Any, order: list[int] | None) -> None:
    assert prepared._order(TensorSpec(dtype="float32", shape=shape, stride=stride)) == order


# Loads a model in a process of its own: its peak against weights and what the process held before.
PEAK = """
import sys, torch
from pathlib import Path
from fxlm.compiler.artifact import open_artifact
from fxlm.models.checkpoint import open_checkpoint
from fxlm.runtime import prepared
from fxlm.compiler import ops
def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
ops.load()
artifact, checkpoint = open_artifact(Path(sys.argv[1])), open_checkpoint(sys.argv[2])
before = status("VmRSS")
folder, choice = Path(sys.argv[3]), sys.argv[4]
weights, _ = prepared.load(artifact, checkpoint, torch.device("cpu"), folder, choice)
sum(float(v.float().sum()) for v in weights.values() if v.nbytes < 1 << 20)
print(status("VmHWM") - before, sum(v.nbytes for v in weights.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's counters")
@pytest.mark.parametrize("choice", ["auto", "off"])
def test_loading_holds_the_weights_and_a_window(tmp_path: Path, choice: str) -> None:
    folder = make_checkpoint(
        "llama", tmp_path / "llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8,
        num_attention_heads=16, num_key_value_heads=4, vocab_size=16384, dtype="bfloat16",
    )  # fmt: skip
    options = CompileOptions(eager=True, pack_weights=True)
    made = compile_model(open_checkpoint(folder), options, cache_dir=tmp_path / "cache")
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(made.artifact.path), str(folder),
         str(tmp_path / "weights"), choice],
        capture_output=True, text=True, check=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    peak, weights = map(int, run.stdout.split())
    assert weights > 256 << 20, "too small to tell"
    assert peak < 1.1 * weights + (160 << 20)
