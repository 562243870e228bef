"""ahead: regions of a model's first layers are those of the whole, compiled by a child."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fxlm.compiler import lower
from fxlm.compiler.options import CompileOptions
from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program
from fxlm.models.checkpoint import Checkpoint, open_checkpoint
from fxlm.models.tiny import write_checkpoint
from fxlm.runtime import ahead, machine
from fxlm.runtime.compile import Compilation, compile_model

may_fork = ahead._may_fork
SLIDING = ["sliding_attention"] * 3 + ["full_attention"]


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has a core to spare, in a process without threads."""
    monkeypatch.setattr(machine, "num_cores", lambda: (2, "a test"))
    monkeypatch.setattr(ahead, "_may_fork", lambda: True)


def checkpoint_of(path: Path, model_type: str, **fields: object) -> Checkpoint:
    write_checkpoint(model_type, path, **fields)
    return open_checkpoint(path)


@pytest.fixture
def deep(tmp_path: Path) -> Checkpoint:
    return checkpoint_of(tmp_path / "deep", "llama", num_hidden_layers=16)


def lowered_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Regions that this process compiles, and not a copy of it."""
    here, found, whole = os.getpid(), [], lower.lower

    def note(regions: dict[Path, object], *args: object, **kwargs: object) -> None:
        if os.getpid() == here:
            found.extend(region.name for region in regions.values())  # type: ignore[attr-defined]
        whole(regions, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(lower, "lower", note)
    return found


def run(checkpoint: Checkpoint, cache: Path) -> Compilation:
    return compile_model(checkpoint, CompileOptions(), cache_dir=cache)


def test_all_regions_of_a_deep_model_come_from_its_first_layers(
    deep: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = lowered_here(monkeypatch)
    made = run(deep, tmp_path / "cache")
    assert sorted(made.artifact.manifest["regions"]) == ["epilogue", "layer", "prologue"]
    assert found == []


def test_what_the_child_does_not_make_is_made_here(
    deep: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = lowered_here(monkeypatch)

    def fail(*args: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(ahead, "outline_first", fail)
    run(deep, tmp_path / "cache")
    assert sorted(found) == ["epilogue", "layer", "prologue"]


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"num_hidden_layers": 8}, 2),
        ({"num_hidden_layers": 7}, 0),  # capturing 2 of 7 saves too little
        ({"num_hidden_layers": 16, "layer_types": SLIDING * 4}, 4),
        ({"num_hidden_layers": 12, "layer_types": SLIDING * 3}, 0),
    ],
)
def test_as_many_layers_as_hold_each_kind(
    tmp_path: Path, fields: dict[str, object], count: int
) -> None:
    checkpoint = checkpoint_of(tmp_path, "qwen3", **fields)
    assert ahead.first_layers(checkpoint, CompileOptions()) == count


@graph_pass
def nothing(program: Program) -> int:
    return 0


@pytest.mark.parametrize(
    "options",
    [
        CompileOptions(passes=(nothing,)),
        CompileOptions(tap=("model.layers.9",)),
        CompileOptions(stages=2),
        CompileOptions(eager=True),
        CompileOptions(device="cuda"),
    ],
    ids=["a user's pass", "a tap", "stages", "eager", "cuda"],
)
def test_not_where_the_first_layers_are_not_like_the_whole(
    deep: Checkpoint, options: CompileOptions
) -> None:
    assert ahead.first_layers(deep, options) == 0


def test_not_beside_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "HARMLESS", {t.name for t in threading.enumerate()})
    assert may_fork()
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="another")
    thread.start()
    try:
        assert not may_fork()
    finally:
        end.set()
        thread.join()


def is_running(process: int) -> bool:
    """Whether it is there and no zombie that nobody asked after."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def noted(path: Path, then: Callable[[], None]) -> Callable[[], None]:
    """Work that writes its process's number first."""

    def work() -> None:
        path.with_suffix(".new").write_text(str(os.getpid()))
        path.with_suffix(".new").rename(path)
        then()

    return work


def number(path: Path) -> int:
    while not path.exists():
        time.sleep(0.01)
    return int(path.read_text())


def fail_beside(work: Callable[[], None], path: Path) -> None:
    with ahead.forked(work):
        number(path)
        raise ValueError("elsewhere")


def test_the_child_ends_with_the_block(tmp_path: Path) -> None:
    path = tmp_path / "child"
    with pytest.raises(ValueError, match="elsewhere"):
        fail_beside(noted(path, lambda: time.sleep(60)), path)
    assert not is_running(number(path))


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    def parent() -> None:
        with ahead.forked(noted(tmp_path / "grandchild", lambda: time.sleep(60))) as wait:
            wait()

    with ahead.forked(noted(tmp_path / "child", parent)) as wait:
        grandchild = number(tmp_path / "grandchild")
        os.kill(number(tmp_path / "child"), signal.SIGKILL)
        wait()
        while is_running(grandchild):
            time.sleep(0.01)
