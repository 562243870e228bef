"""Artifacts in the cache: found again, moved, damaged, made once by several processes."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from fxlm.compiler.artifact import open_artifact
from fxlm.compiler.errors import InvalidOption
from fxlm.compiler.options import CompileOptions
from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program
from fxlm.models.checkpoint import Checkpoint, open_checkpoint
from fxlm.runtime.compile import Compilation, compile_model

Compile = Callable[..., Compilation]


@pytest.fixture
def checkpoint() -> Checkpoint:
    return open_checkpoint("bundled-draft")


@pytest.fixture
def build(checkpoint: Checkpoint, tmp_path: Path) -> Compile:
    def run(**options: object) -> Compilation:
        return compile_model(
            checkpoint, CompileOptions(eager=True, **options), cache_dir=tmp_path  # type: ignore[arg-type]
        )  # fmt: skip

    return run


def test_the_second_time_it_is_found(build: Compile) -> None:
    first, second = build(), build()
    assert (first.cached, second.cached) == (False, True)
    assert first.artifact.path == second.artifact.path


def test_options_make_another_key(build: Compile) -> None:
    assert build().artifact.key != build(dtype="float32").artifact.key


def test_passes_make_another_key(build: Compile) -> None:
    @graph_pass
    def double(program: Program) -> int:
        head = program.linears("lm_head")[0]
        with program.graph.inserting_before(head.next):
            twice = program.call(torch.ops.aten.mul.Scalar, head, 2.0, like=head)
        head.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)
        return 1

    changed = build(passes=(double,))
    assert changed.artifact.key != build().artifact.key
    assert "double" in [p["name"] for p in changed.artifact.manifest["passes"]]


def test_a_disabled_pass_is_not_run(build: Compile) -> None:
    names = [p["name"] for p in build(disabled=("fuse_qkv",)).artifact.manifest["passes"]]
    assert "fuse_qkv" not in names


def test_damage_is_repaired(build: Compile) -> None:
    path = build().artifact.path
    (path / "load.json").write_text("{}")
    assert not build().cached
    assert open_artifact(path)


def test_others_may_read_it(build: Compile) -> None:
    files = [file for file in build().artifact.path.rglob("*") if file.is_file()]
    plain = files[0].parent / "plain"
    plain.touch()  # with the mode that the umask gives
    assert {file.name: file.stat().st_mode for file in files} == dict.fromkeys(
        (file.name for file in files), plain.stat().st_mode
    )


def test_it_holds_no_absolute_path_and_no_pickle(build: Compile, tmp_path: Path) -> None:
    path = build().artifact.path
    for file in path.rglob("*"):
        if file.suffix in (".json", ".jinja"):
            assert str(tmp_path) not in file.read_text()
        assert file.suffix not in (".pkl", ".pickle", ".pt", ".bin")


def test_it_moves(build: Compile, tmp_path: Path) -> None:
    moved = shutil.move(build().artifact.path, tmp_path / "elsewhere")
    assert open_artifact(Path(moved)).caches()


def test_several_processes_make_it_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from fxlm.compiler.options import CompileOptions\n"
        "from fxlm.models.checkpoint import open_checkpoint\n"
        "from fxlm.runtime.compile import compile_model\n"
        "made = compile_model(open_checkpoint('bundled-draft'), CompileOptions(eager=True),\n"
        "                     cache_dir=Path(sys.argv[1]))\n"
        "print(made.cached)\n"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [run.communicate()[0].decode().strip() for run in runs]
    assert sorted(said) == ["False", "True"]


def test_serving_needs_neither_inductor_nor_transformers(tmp_path: Path) -> None:
    code = (
        "import json, sys; from fxlm.runtime.options import EngineOptions\n"
        "from fxlm.runtime.worker import build_engine\n"
        "engine, _, made = build_engine(EngineOptions(model='bundled-draft',\n"
        "    enforce_eager=True, cache_dir=sys.argv[1], kv_cache_memory_bytes=8 << 20))\n"
        "names = ('torch._inductor', 'torch._dynamo', 'transformers')\n"
        "print(json.dumps([made.cached, [n for n in names if n in sys.modules]]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    said = [subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout for _ in range(2)]
    assert json.loads(said[0])[0] is False
    assert json.loads(said[1]) == [True, []]


def test_output_never_replaces_what_is_no_artifact(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / "file.txt").write_text("precious")
    for target in (tmp_path / "keep", tmp_path / "keep" / "file.txt", tmp_path / "no" / "where"):
        with pytest.raises(InvalidOption, match="--output"):
            compile_model(checkpoint, CompileOptions(eager=True), cache_dir=tmp_path, output=target)
    (tmp_path / "keep" / "manifest.json").write_text("{}")  # as other programs have, too
    with pytest.raises(InvalidOption, match="it holds other files"):
        compile_model(
            checkpoint, CompileOptions(eager=True), cache_dir=tmp_path, output=tmp_path / "keep"
        )
    assert (tmp_path / "keep" / "file.txt").read_text() == "precious"


def test_an_output_that_cannot_be_read_is_named(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)  # root may read everything
    with pytest.raises(InvalidOption, match=r"--output.*permission denied"):
        compile_model(checkpoint, CompileOptions(eager=True), cache_dir=tmp_path, output=tmp_path)


def test_output_replaces_an_artifact(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        options = CompileOptions(eager=True, dtype=dtype)
        made = compile_model(checkpoint, options, cache_dir=tmp_path, output=tmp_path / "out")
        assert made.artifact.manifest["model"]["dtype"] == dtype


def test_an_unwritable_cache_is_named(checkpoint: Checkpoint) -> None:
    with pytest.raises(InvalidOption, match=r"--cache-dir.*be compiled \(there is no artifact of"):
        compile_model(checkpoint, CompileOptions(eager=True), cache_dir=Path("/proc/nothing"))


def test_a_pass_the_engine_needs_cannot_be_left_out(build: Compile) -> None:
    with pytest.raises(InvalidOption, match="cannot run without it"):
        build(disabled=("paged_attention",))
