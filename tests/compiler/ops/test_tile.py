"""The tile unit by itself: hardware where there is AMX, software everywhere, one set of checks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fxlm.compiler.ops import build

CHECKS = Path(__file__).with_name("tile_unit.cpp")


@pytest.fixture(scope="module", params=["amxemulated", "amx"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    isa = build.ISAS[request.param]
    if isa.needs - build.cpu_flags():
        pytest.skip(f"this CPU does not run {request.param}")
    try:
        compiler = build._compiler()
    except build.BuildError:
        pytest.skip("no compiler here")
    path = tmp_path_factory.mktemp("tile") / request.param
    flags = ["-std=c++17", "-O1", "-Wno-psabi", *isa.flags, f"-I{build.SOURCES}"]
    subprocess.run([compiler, *flags, str(CHECKS), "-o", str(path)], check=True)
    return path


def test_products_are_those_of_plain_loops(program: Path) -> None:
    assert subprocess.run([program]).returncode == 0


def test_shapes_that_do_not_fit_are_refused(program: Path) -> None:
    assert subprocess.run([program, "misfit"], capture_output=True).returncode < 0  # by a signal
