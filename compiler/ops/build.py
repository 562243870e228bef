"""Compiles csrc/ for the CPU at hand, caches the library for the user, and loads it.

One shared library an ISA, each whole: no code of a wider ISA can reach a narrower CPU, and only
the library that will run is compiled (about 4 s of one core). ``python -m fxlm.compiler.ops.build``
does it ahead of time.

The cache key covers sources, flags, ISA and torch version. The compiler's version is recorded
beside the library but is no part of the key: a machine that serves need not have a compiler.

Two variables of the environment are read, here alone: ``FXLM_CPU_ISA`` (one of `ISAS`, or
``reference`` for no kernels at all; for tests) and ``CXX``.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fxlm.compiler.cache import cache_directory, file_digest
from fxlm.compiler.errors import FxlmError, InvalidOption

_log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
LIBRARY = "fxlm_ops.so"
RECORD = "build.json"
REFERENCE = "reference"
COMMON = [
    "-std=c++17",
    "-fPIC",
    "-fopenmp-simd",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]
# File -> its own flags. Bindings are torch headers above all: optimizing them costs time alone.
# The pool implements a class of torch's, which is no part of the stable ABI.
UNITS = {
    "attention.cpp": ("-O3",),
    "attention_tiles.cpp": ("-O3",),
    "linear.cpp": ("-O3",),
    "linear_tiles.cpp": ("-O3",),
    "sample.cpp": ("-O3", "-ffp-contract=off"),
    "quantized.cpp": ("-O3", "-ffp-contract=off"),
    "quantized_pack.cpp": ("-O3",),
    "pool.cpp": ("-O2", "-UTORCH_TARGET_VERSION"),
    "bindings.cpp": ("-O1",),
    "bindings_quantized.cpp": ("-O1",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Isa:
    """An instruction set: compiler flags, and what /proc/cpuinfo must list for it to run.

    One that is ``for_tests`` is used where FXLM_CPU_ISA names it, and nowhere else.
    """

    flags: tuple[str, ...]
    needs: frozenset[str]
    for_tests: bool = False


_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = (
    *_AVX2,
    *("-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl"),
    "-mprefer-vector-width=512",
)
_NEEDS_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_NEEDS_AVX512 = _NEEDS_AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

_VNNI = (*_AVX512, "-mavx512vnni")
_NEEDS_VNNI = _NEEDS_AVX512 | {"avx512_vnni"}
_BF16 = (*_VNNI, "-mavx512bf16", "-mavx512vbmi")
_NEEDS_BF16 = _NEEDS_VNNI | {"avx512_bf16", "avx512vbmi"}

# Best first; ``generic`` runs on anything, of any architecture. The tests' own: AMX in software.
ISAS = {
    "amx": Isa(
        flags=(*_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
        needs=_NEEDS_BF16 | {"amx_tile", "amx_bf16", "amx_int8"},
    ),
    "avx512bf16": Isa(flags=_BF16, needs=_NEEDS_BF16),
    "avx512vnni": Isa(flags=_VNNI, needs=_NEEDS_VNNI),
    "avx512": Isa(flags=_AVX512, needs=_NEEDS_AVX512),
    "avxvnni": Isa(flags=(*_AVX2, "-mavxvnni"), needs=_NEEDS_AVX2 | {"avx_vnni"}),
    "avx2": Isa(flags=_AVX2, needs=_NEEDS_AVX2),
    "generic": Isa(flags=(), needs=frozenset()),
    "amxemulated": Isa(flags=(*_AVX2, "-DFXLM_EMULATED_TILES"), needs=_NEEDS_AVX2, for_tests=True),
}


class BuildError(FxlmError):
    """The kernels cannot be compiled; the message holds the compiler's own words."""


def load_kernels() -> str:
    """Load the best library there is, building it where it is missing; returns its ISA.

    Returns ``reference``, after a warning that says why, where none can be built.
    """
    reason = ""
    for isa in usable_isas():
        try:
            _load(isa)
        except (BuildError, OSError) as error:
            reason = reason or f"{isa}: {error}{_remedy(error)}"
            _log.debug("CPU kernels for %s are not available: %s", isa, error)
            continue
        if reason:
            _log.warning("CPU kernels: using %s, since %s", isa, reason)
        _log.info("CPU kernels: %s", isa)
        return isa
    if reason:
        _log.warning("CPU kernels: none; the slow PyTorch references serve. %s", reason)
    return REFERENCE


def _remedy(error: BuildError | OSError) -> str:
    """What to do where the cache cannot be written; a compiler's own words stand alone."""
    written = isinstance(error, OSError) and error.errno is not None
    return "; let XDG_CACHE_HOME name a directory that can be written" if written else ""


def _load(isa: str) -> None:
    import torch

    library = build(isa)
    torch.ops.load_library(str(library))
    _pool_tensors(library)


def _pool_tensors(library: Path) -> None:
    """Let torch take tensors on the CPU from the library's pool, from now on."""
    ctypes.CDLL(str(library)).fxlm_pool_tensors()


def _is_whole(library: Path) -> bool:
    """Whether a library is as it was built: a wrong byte in code ends the process, or worse."""
    try:
        record = json.loads((library.parent / RECORD).read_text(encoding="utf-8"))
        return bool(record["sha256"] == file_digest(library))
    except (OSError, ValueError, LookupError, TypeError):
        return False


def usable_isas() -> list[str]:
    """ISAS that this CPU runs, best first; the override alone where one is set."""
    present = cpu_flags()
    usable = [name for name, isa in ISAS.items() if isa.needs <= present]
    override = os.environ.get("FXLM_CPU_ISA", "")
    if not override:
        return [name for name in usable if not ISAS[name].for_tests]
    if override == REFERENCE:
        return []
    if override not in usable:
        raise InvalidOption(
            "FXLM_CPU_ISA", override, f"this CPU runs {', '.join(usable)} and {REFERENCE}"
        )
    return [override]


def cpu_flags() -> frozenset[str]:
    """Feature flags in /proc/cpuinfo's spelling; empty where there is no such file."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def build(isa: str) -> Path:
    """The library of an ISA, compiled unless the cache has it whole. Safe with many processes.

    Raises:
        BuildError: no compiler, or it failed.
        OSError: the cache cannot be written.
    """
    folder = cache_root() / key(isa)
    library = folder / LIBRARY
    if _is_whole(library):
        return library
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(folder.with_suffix(".lock")):
        if not _is_whole(library):  # another process may have built it while we waited
            if library.exists():
                _log.warning("%s is damaged: building it again", library)
            _build_into(folder, isa)
    return library


def cache_root() -> Path:
    """Where libraries are kept: the user's cache directory, fxlm/ops."""
    return cache_directory() / "ops"


def key(isa: str) -> str:
    """Content key of a library: sources, flags, torch version, architecture."""
    digest = hashlib.sha256()
    parts = [_torch_version(), platform.machine(), isa, *ISAS[isa].flags, *COMMON, repr(UNITS)]
    for path in sorted(SOURCES.iterdir()):
        parts += [path.name, path.read_text(encoding="utf-8")]
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return f"{isa}-{digest.hexdigest()[:32]}"


def _torch_version() -> str:
    import torch

    return str(torch.__version__)


def _torch_folder() -> Path:
    import torch

    return Path(torch.__file__).parent


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, or the process dies
        yield


def _build_into(folder: Path, isa: str) -> None:
    compiler = _compiler()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".build-") as name:
        work = Path(name)
        (work / "done").mkdir()
        _compile(compiler, isa, work)
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True)
        record = {
            "isa": isa,
            "compiler": version.stdout.partition("\n")[0],
            "sha256": file_digest(work / "done" / LIBRARY),
        }
        (work / "done" / RECORD).write_text(json.dumps(record), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # what is there is damaged
        (work / "done").rename(folder)
    _log.info("compiled the %s kernels in %.1f s", isa, time.perf_counter() - began)


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise BuildError("no C++ compiler is on PATH; install g++, or name one in CXX")


def _compile(compiler: str, isa: str, work: Path) -> None:
    torch = _torch_folder()
    flags = [*COMMON, *ISAS[isa].flags, f"-I{torch / 'include'}", f"-I{SOURCES}"]
    objects = [work / f"{unit}.o" for unit in UNITS]
    _run_all(
        [
            [compiler, *flags, *own, "-c", str(SOURCES / unit), "-o", str(target)]
            for (unit, own), target in zip(UNITS.items(), objects, strict=True)
        ]
    )
    link = [compiler, "-shared", *map(str, objects), "-o", str(work / "done" / LIBRARY)]
    _run_all([[*link, f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]])


def _run_all(commands: list[list[str]]) -> None:
    """Run side by side; the first failure is raised once all have ended."""
    running = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    errors = [process.communicate()[1] for process in running]
    for command, process, error in zip(commands, running, errors, strict=True):
        if process.returncode != 0:
            raise BuildError(f"{command[0]} ended with {process.returncode}:\n{error[-4000:]}")


def main() -> None:
    """Build ahead of time: for this CPU, or for what ``--isa`` names."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--isa", choices=[*ISAS, "all"], help="default: the best of this CPU")
    chosen = parser.parse_args().isa
    served = [name for name, isa in ISAS.items() if not isa.for_tests]
    names = served if chosen == "all" else [chosen or usable_isas()[0]]
    for name in names:
        began = time.perf_counter()
        path = build(name)
        print(f"{name}  {time.perf_counter() - began:.1f} s  {path}")


if __name__ == "__main__":
    main()
