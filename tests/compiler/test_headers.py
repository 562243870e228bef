"""Precompiled headers: what a source begins with, kept under a name of its content."""

import os
import subprocess
from pathlib import Path

import pytest

from fxlm.compiler.builds import Builds
from fxlm.compiler.headers import find, leading

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
