"""Passes of installed packages, by entry point: what pip makes of e2e/packages/fxlm_louder."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest

from fxlm.compiler.errors import InvalidOption
from fxlm.runtime.options import EngineOptions, compile_options, load_pass

PACKAGE = Path(__file__).resolve().parents[1] / "e2e" / "packages" / "fxlm_louder"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an installation leaves behind: the module, and its metadata."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    shutil.copyfile(PACKAGE / "fxlm_louder.py", tmp_path / "fxlm_louder.py")
    meta = tmp_path / "fxlm_louder-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["fxlm.passes"]
    lines = "".join(f"{name} = {place}\n" for name, place in points.items())
    (meta / "entry_points.txt").write_text(f"[fxlm.passes]\n{lines}")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("installed")
def test_an_installed_pass_goes_by_its_name() -> None:
    options = compile_options(EngineOptions(passes=("louder",), device="cpu"))
    assert [item.name for item in options.passes] == ["louder"]


@pytest.mark.usefixtures("installed")
def test_it_counts_in_the_key_by_its_source() -> None:
    assert len(load_pass("louder").source_digest()) == 64


@pytest.mark.usefixtures("installed")
def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidOption, match="did you mean 'louder'"):
        load_pass("lauder")


def test_nothing_installed_is_said() -> None:
    with pytest.raises(InvalidOption, match=r"FILE.py:NAME, or the name of an installed pass"):
        load_pass("nothing-of-the-kind")


@pytest.mark.usefixtures("installed")
def test_a_package_that_does_not_import_is_named() -> None:
    with pytest.raises(InvalidOption, match="fxlm_louder_absent:broken does not import"):
        load_pass("broken")
