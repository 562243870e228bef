"""Building and choosing kernels: overrides, no compiler, damage, and every ISA of this CPU."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fxlm.compiler.errors import InvalidOption
from fxlm.compiler.ops import build

TESTS = Path(__file__).parent


def test_the_best_isa_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FXLM_CPU_ISA", raising=False)
    avx2 = {"avx2", "fma", "f16c", "bmi2"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
    for flags, best in (
        (set(), "generic"),
        (avx2, "avx2"),
        (avx512, "avx512"),
        (avx512 | {"avx512_vnni"}, "avx512vnni"),
        (avx512 | {"avx512_bf16"}, "avx512"),
        (avx512 | {"avx512_vnni", "avx512_bf16"}, "avx512vnni"),  # Cooper Lake
        (avx512 | {"avx512_vnni", "avx512_bf16", "avx512vbmi"}, "avx512bf16"),
        (avx2 | {"avx_vnni"}, "avxvnni"),
        (
            avx512 | {"avx512_vnni", "avx512_bf16", "avx512vbmi", "amx_tile", "amx_bf16"},
            "avx512bf16",
        ),
        (
            avx512
            | {"avx512_vnni", "avx512_bf16", "avx512vbmi", "amx_tile", "amx_bf16", "amx_int8"},
            "amx",
        ),
        (avx2 | {"avx512f"}, "avx2"),
    ):
        monkeypatch.setattr(build, "cpu_flags", lambda flags=flags: frozenset(flags))
        assert build.usable_isas()[0] == best
        assert build.usable_isas()[-1] == "generic"


def test_an_override_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cpu_flags", frozenset)
    monkeypatch.setenv("FXLM_CPU_ISA", "avx2")
    with pytest.raises(InvalidOption, match="this CPU runs generic and reference"):
        build.usable_isas()
    monkeypatch.setenv("FXLM_CPU_ISA", "reference")
    assert build.usable_isas() == []


def test_an_isa_for_tests_must_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset({"avx2", "fma", "f16c", "bmi2"}))
    monkeypatch.delenv("FXLM_CPU_ISA", raising=False)
    assert build.usable_isas() == ["avx2", "generic"]
    monkeypatch.setenv("FXLM_CPU_ISA", "amxemulated")
    assert build.usable_isas() == ["amxemulated"]


def test_another_machine_has_no_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert build.cpu_flags() == frozenset()


def test_without_a_compiler_the_references_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        assert build.load_kernels() == "reference"
    assert "no C++ compiler is on PATH" in caplog.text


def test_a_failing_compiler_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho out of cheese >&2\nexit 7\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.load_kernels() == "reference"
    assert "ended with 7" in caplog.text
    assert "out of cheese" in caplog.text
    assert [p.suffix for p in build.cache_root().iterdir() if p.is_dir()] == []  # nothing half done


def test_an_unwritable_cache_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build.load_kernels() == "reference"
    assert "let XDG_CACHE_HOME name a directory that can be written" in caplog.text


def test_many_builders_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built: list[str] = []

    def compile_nothing(compiler: str, isa: str, work: Path) -> None:
        built.append(isa)
        (work / "done" / build.LIBRARY).write_bytes(b"")

    monkeypatch.setattr(build, "_compile", compile_nothing)
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(build.build, ["generic"] * 8))
    assert built == ["generic"]
    assert [path.name for path in paths] == [build.LIBRARY]


def test_the_key_covers_sources_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {build.key("avx2"), build.key("generic")}
    monkeypatch.setattr(build, "COMMON", [*build.COMMON, "-g"])
    keys.add(build.key("generic"))
    (tmp_path / "one.cpp").write_text("int x;")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    keys.add(build.key("generic"))
    (tmp_path / "one.cpp").write_text("int y;")
    keys.add(build.key("generic"))
    assert len(keys) == 5


@pytest.mark.parametrize("damage", ["no library", "one bit"])
def test_a_damaged_library_is_built_again(damage: str, registered: str, tmp_path: Path) -> None:
    if registered == "reference":
        pytest.skip("no compiler here")
    root = build.cache_root()
    target = tmp_path / "fxlm" / "ops" / build.key(registered)
    shutil.copytree(root / build.key(registered), target)
    good = (target / build.LIBRARY).read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    (target / build.LIBRARY).write_bytes(bad if damage == "one bit" else b"no library at all")
    script = (
        "from fxlm.compiler.ops import build\n"
        "def copy(compiler, isa, work):\n"
        f"    source = {str(root / build.key(registered) / build.LIBRARY)!r}\n"
        "    (work / 'done' / build.LIBRARY).write_bytes(open(source, 'rb').read())\n"
        "build._compile = copy\n"
        "from fxlm.compiler import ops\n"
        "print(ops.cpu_implementation())\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.stdout == f"{registered}\n", done.stderr
    assert "is damaged: building it again" in done.stderr
    assert (target / build.LIBRARY).read_bytes() == good


@pytest.mark.timeout(1200)  # compiles for most of a minute, on an idle machine
@pytest.mark.parametrize("isa", [name for name in build.ISAS if name != "generic"] + ["generic"])
def test_every_isa_passes_the_numeric_tests(isa: str, registered: str) -> None:
    if build.ISAS[isa].needs - build.cpu_flags() or isa == registered:
        pytest.skip("this CPU does not run it, or it is what the other tests use")
    if build.ISAS[isa].for_tests and registered == "amx":
        pytest.skip("the other tests use the unit that it stands in for")
    chosen = "kernel or naive_loop or no_bit or plain_python or logprobs or without_a_number"
    tiled = ("linear", "quantized_kernels", "quantized_epilogues", "attention")
    ours = tiled if build.ISAS[isa].for_tests else (*tiled, "sample")
    files = [str(TESTS / f"test_{name}.py") for name in ours]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "-k", chosen, *files],
        capture_output=True,
        text=True,
        env={**os.environ, "FXLM_CPU_ISA": isa},
        cwd=TESTS.parents[2],
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_quantized_layers_have_the_same_bits_on_tiles_and_on_vectors(registered: str) -> None:
    if build.ISAS["amxemulated"].needs - build.cpu_flags():
        pytest.skip("the software unit needs AVX2")
    tiles = "amx" if registered == "amx" else "amxemulated"
    script = (
        "import hashlib, torch\n"
        "import test_quantized_kernels as t\n"
        "from fxlm.compiler import ops\n"
        "ops.load()\n"
        "digest = hashlib.sha256()\n"
        "for name in (n for n, s in t.SCHEMES.items() if s.kind == 'int'):\n"
        "    for shape in ((129, 700), (67, 1029), (3, 7)):\n"
        "        for rows in (1, 6, 17, 67):\n"
        "            for dtype in t.TOLERANCE:\n"
        "                y = t.weight_of(name, *shape)(t.normal(rows, shape[1], dtype=dtype))\n"
        "                digest.update(y.view(torch.uint8).numpy().tobytes())\n"
        "print(ops.cpu_implementation(), digest.hexdigest())\n"
    )
    found = {}
    for isa in (tiles, "avx2"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            env={**os.environ, "FXLM_CPU_ISA": isa, "PYTHONPATH": str(TESTS)},
        )
        assert done.stdout.startswith(f"{isa} "), done.stderr
        found[isa] = done.stdout.split()[1]
    assert found[tiles] == found["avx2"]


def test_where_the_system_denies_tiles_vectors_serve() -> None:
    """The library for AMX on a CPU that has all it needs but AMX."""
    flags = build.cpu_flags()
    if build.ISAS["avx512bf16"].needs - flags or "amx_tile" in flags:
        pytest.skip("needs AVX512-BF16 without AMX")
    script = (
        "import torch\n"
        "from fxlm.compiler import ops\n"
        "from fxlm.compiler.ops import build\n"
        "build.cpu_flags = lambda: build.ISAS['amx'].needs\n"
        "print(ops.cpu_implementation())\n"
        "x, w = torch.ones(3, 70).bfloat16(), torch.ones(65, 70).bfloat16()\n"
        "packed = torch.ops.fxlm.pack_weight(w)\n"
        "print(torch.ops.fxlm.packed_linear(x, packed, None, 65).unique().tolist())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "FXLM_CPU_ISA"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "amx\n[70.0]\n", done.stderr
