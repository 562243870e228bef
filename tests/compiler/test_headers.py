"""Precompiled headers: what a source begins with, kept under a name of its content."""

import os
import subprocess
from pathlib import Path

import pytest

from fxlm.compiler.builds import Builds
from fxlm.compiler.headers import find, leading
from fxlm.compiler.lower import shared_store

GXX = ["g++", "-O0"]


def run(command: list[str]) -> None:
    subprocess.run(command, check=True)


def test_includes_are_read_up_to_the_first_other_line() -> None:
    source = "// said\n\n#include <vector>\n#include <map>\nint x;\n#include <set>\n"
    assert leading(source) == "#include <vector>\n#include <map>\n"
    assert leading("int x;\n") == ""


def test_a_header_is_made_once_and_found_by_content(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("store", "a", "b", "c", "d")]
    for folder in folders:
        folder.mkdir()
    store, *works = folders
    text = "#include <cstddef>\n"
    assert find(GXX, text, store, works[0], None) is None
    made = find(GXX, text, store, works[1], run)
    assert made is not None
    assert made.with_name(f"{made.name}.gch").is_file()
    assert find(GXX, text, store, works[2], None) == made
    assert find([*GXX, "-DNDEBUG"], text, store, works[3], None) is None


def test_the_compiler_is_asked_again_when_a_file_changes(tmp_path: Path) -> None:
    store, own = tmp_path / "store", tmp_path / "own.h"
    store.mkdir()
    own.write_text("int one();\n")
    command, text = [*GXX, f"-I{tmp_path}"], "#include <own.h>\n"

    def found(name: str, make: bool) -> Path | None:
        work = tmp_path / name
        work.mkdir()
        return find(command, text, store, work, run if make else None)

    first = found("a", True)
    assert found("b", False) == first
    own.write_text("int one(); int two();\n")
    assert found("c", False) is None
    second = found("d", True)
    assert second not in (None, first)
    assert found("e", False) == second


@pytest.mark.parametrize("precompile", [True, False])
def test_sources_are_compiled_behind_it(precompile: bool, tmp_path: Path) -> None:
    source, made = tmp_path / "one.cpp", tmp_path / "one.o"
    source.write_text("#include <cstddef>\nstd::size_t answer = 42;\n")
    builds = Builds(tmp_path, workers=1, precompile=precompile)
    builds.take(f"g++ -c {source} -o {made}", str(tmp_path))
    builds.wait()
    builds.stop()
    assert bool(list(tmp_path.glob("headers-*/*.gch"))) is precompile
    assert os.path.getsize(tmp_path / "done-one.o") > 0


def test_what_all_share_lies_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert shared_store(tmp_path / "store") == tmp_path / "fxlm" / "headers"
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # no folder can be made in it
    assert shared_store(tmp_path / "store") == tmp_path / "store"
