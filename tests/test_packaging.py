"""What is in the source and binary distributions, and what becomes importable of them.

An editable install hides every fault of this kind, so the wheel is built and laid out for real.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
# Package name -> folder of the checkout.
ROOMS: dict[str, str] = SETUPTOOLS["package-dir"]
IGNORED = ("__pycache__", "*.pyc", "*.so", "*.egg-info", "build", "dist", ".*")


def files_of_rooms() -> dict[str, Path]:
    """Path in the wheel -> path in the checkout, of every file under the rooms."""
    return {
        f"{package.replace('.', '/')}/{path.relative_to(REPO / folder).as_posix()}": path
        for package, folder in ROOMS.items()
        for path in (REPO / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that was built from it, both made from a copy."""
    source = tmp_path_factory.mktemp("source") / "fxlm"
    shutil.copytree(REPO, source, ignore=shutil.ignore_patterns(*IGNORED))
    for name in ("MANIFEST.in", "pyproject.toml"):
        assert (source / name).is_file()
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."],
        cwd=source,
        check=True,
        capture_output=True,
        text=True,
    )
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (wheel,) = distributions.glob("*.whl")
    return wheel


def run_apart(code: str, target: Path) -> subprocess.CompletedProcess[str]:
    """Run code that sees the target folder and the installed libraries, but no editable install.

    ``-S`` leaves out the ``.pth`` files, and with them the import hook of the checkout.
    """
    libraries = sysconfig.get_paths()["purelib"]
    prelude = f"import sys; sys.path[:0] = [{str(target)!r}]; sys.path.append({libraries!r}); "
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", prelude + code],
        cwd=target,
        capture_output=True,
        text=True,
        check=False,
    )


def test_package_list_equals_the_tree() -> None:
    found = {
        ".".join([package, *path.relative_to(REPO / folder).parent.parts])
        for package, folder in ROOMS.items()
        for path in (REPO / folder).rglob("*.py")
    }
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)


def test_packages_have_an_init() -> None:
    folders = {path.parent for path in files_of_rooms().values() if path.suffix == ".py"}
    assert [str(f) for f in sorted(folders) if not (f / "__init__.py").is_file()] == []


def test_wheel_holds_every_file_of_the_rooms(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert sorted(files_of_rooms().keys() - names) == []
    assert "fxlm/py.typed" in names


def test_wheel_holds_nothing_else(wheel: Path) -> None:
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert sorted(names - files_of_rooms().keys()) == []


def test_sdist_carries_its_tests(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "Makefile", "constraints.txt", "tests/conftest.py", "bench/common.py"}
    assert sorted(wanted - names) == []


def test_wheel_names_its_command_and_license(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    text = archive.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    assert any(n.endswith("licenses/LICENSE") for n in archive.namelist())
    entry_points = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert "fxlm = fxlm.__main__:main" in entry_points


def test_installed_wheel_imports_as_fxlm_alone(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)  # a pure wheel is laid out as it is zipped
    find = f"import importlib.util as u; print([p for p in {SETUPTOOLS['packages']!r} if not "
    found = run_apart(f"import fxlm; {find} u.find_spec(p)], fxlm.__file__)", tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == f"[] {tmp_path / 'fxlm' / '__init__.py'}"


@pytest.mark.parametrize("editable", [False, True])
def test_nothing_else_becomes_importable(editable: bool, wheel: Path, tmp_path: Path) -> None:
    names = [*(folder for folder in ROOMS.values() if folder != "fxlm"), "tests", "bench"]
    code = f"import importlib.util as u; print([n for n in {names!r} if u.find_spec(n)])"
    if editable:
        command = [sys.executable, "-I", "-c", code]
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    else:
        zipfile.ZipFile(wheel).extractall(tmp_path)
        found = run_apart(code, tmp_path)
    assert (found.stdout.strip(), found.stderr) == ("[]", "")


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_spin_so_long_unless_the_user_says_otherwise(
    given: dict[str, str], found: str
) -> None:
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import fxlm, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **given}, capture_output=True, text=True
    )
    assert done.stdout.strip() == found, done.stderr
