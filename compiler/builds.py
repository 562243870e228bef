"""Builds: the C++ compilations that Inductor asks for, run side by side while it goes on.

Inductor waits for each of its compiler runs. Within `side_by_side` a run is queued instead and
Inductor sees an empty output file; `Builds.wait` puts the real ones in place. What is the same for
every region is compiled once a machine and kept in ``store``, named by a digest of what goes into
it: torch's AOTInductor runtime, half of what a wrapper costs, as an object; the headers that
sources begin with, most of what is left, precompiled (`headers`). Not here: what is compiled
(`lower`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from fxlm.compiler import headers
from fxlm.compiler.sharing import gated

STUBS = "stubs"  # folder in the store
# Behind the include of a wrapper's own header; said in the one place, taken back in the others.
_RUNTIME = "#include <torch/csrc/inductor/aoti_runtime/model.h>\n"
_BASE = "class AOTInductorModelBase<AOTInductorModel>;"
_DEFINE = f"\nnamespace torch::aot_inductor {{ template {_BASE} }}\n"
_DECLARE = f"\n{_RUNTIME}namespace torch::aot_inductor {{ extern template {_BASE} }}\n"
# The runtime's header has a regular expression for names of devices. Whether or not it is used,
# each source that includes it instantiates an engine for it, half of what a wrapper then costs.
_DECLARE += """#ifdef __GLIBCXX__
namespace std::__detail {
using fxlm_iterator = std::string::const_iterator;
using fxlm_matches = std::allocator<std::sub_match<fxlm_iterator>>;
using fxlm_traits = std::regex_traits<char>;
extern template class _Compiler<fxlm_traits>;
extern template class _Executor<fxlm_iterator, fxlm_matches, fxlm_traits, true>;
extern template class _Executor<fxlm_iterator, fxlm_matches, fxlm_traits, false>;
}
#endif
"""


class BuildFailed(Exception):
    """A compiler run failed; the message holds its output. Inside of the compiler room only."""


class Builds:
    """A queue of compiler and linker runs.

    Args:
        store: folder for what all regions share.
        workers: runs at a time.
        precompile: make precompiled headers that the store lacks. Both take about 10 s and save
            3 s a region; those that the store has are used in any case.
    """

    def __init__(self, store: Path, workers: int, *, precompile: bool = False) -> None:
        self._store = store
        self._precompile = precompile
        self._headers: dict[tuple[str, ...], Future[Path | None]] = {}
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="fxlm-build")
        self._jobs: dict[str, Future[None]] = {}  # by the output that was asked for
        self._shared: dict[str, str] = {}  # output of a wrapper -> the object it leaves out
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def take(self, command_line: str, cwd: str) -> None:
        """Queue a run in Inductor's stead; its output is an empty file until `wait`."""
        words = shlex.split(command_line)
        output = words[words.index("-o") + 1]
        words[words.index("-o") + 1] = _real(output)
        Path(output).touch()
        if any(word.endswith(".S") for word in words):
            self._jobs[output] = self._now(words)
        elif "-c" in words:
            self._jobs[output] = self._compile(words, output)
        else:
            self._jobs[output] = self._link(words)

    def wait(self) -> None:
        """Wait for all runs.

        Raises:
            BuildFailed: one failed.
        """
        for output, job in self._jobs.items():
            job.result()
            if output.endswith(".so"):
                os.replace(_real(output), output)

    def stop(self) -> None:
        """End what still runs; nothing new starts."""
        self._stopped = True
        for process in list(self._running):
            process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _now(self, words: list[str]) -> Future[None]:
        """Run, before all in the queue, what takes no time and whose source Inductor removes."""
        self._run(words)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _compile(self, words: list[str], output: str) -> Future[None]:
        words = [*words, "-g0"]  # lines of generated code help nobody, and cost 4 MB a region
        for index, word in enumerate(words):
            if word.endswith(".wrapper.cpp") and (halves := _halves(Path(word))):
                shared, own = halves
                self._shared[output] = self._runtime(words, index, shared)
                words[index] = own
            elif word.endswith(".kernel.cpp"):
                source = Path(word)
                source.write_text(gated(source.read_text()))
        return self._pool.submit(self._compile_behind, words, self._header(words))

    def _header(self, words: list[str]) -> Future[Path | None]:
        """The precompiled header of what a source begins with; queued when it is new."""
        source = next(word for word in words if word.endswith(".cpp"))
        includes = headers.leading(Path(source).read_text())
        flags = [w for w in words if w not in (source, "-c", "-o", _output(words))]
        key = (*flags, includes)
        if key not in self._headers:
            self._headers[key] = self._pool.submit(self._find_header, flags, includes)
        return self._headers[key]

    def _find_header(self, flags: list[str], includes: str) -> Path | None:
        if not includes:
            return None
        with tempfile.TemporaryDirectory(dir=self._store, prefix=".build-") as work:
            run = self._run if self._precompile else None
            return headers.find(flags, includes, self._store, Path(work), run)

    def _compile_behind(self, words: list[str], header: Future[Path | None]) -> None:
        found = header.result()  # queued earlier, so it has a worker of its own or is done
        self._run([*words, "-include", str(found)] if found else words)

    def _runtime(self, words: list[str], index: int, source: str) -> str:
        """The object of the code that regions share; queued if the store lacks it."""
        flags = [w for i, w in enumerate(words) if i != index and w != _output(words)]
        text = "\0".join([*flags, Path(source).read_text()])
        target = str(self._store / f"runtime-{hashlib.sha256(text.encode()).hexdigest()[:32]}.o")
        if target not in self._jobs:
            command = list(words)
            command[index], command[words.index("-o") + 1] = source, target
            self._jobs[target] = self._pool.submit(self._keep, command, target)
        return target

    def _keep(self, command: list[str], target: str) -> None:
        """Compile into the store, unless another process did."""
        if Path(target).exists():
            return
        with tempfile.TemporaryDirectory(dir=self._store, prefix=".build-") as work:
            made = str(Path(work) / "object.o")
            self._run([made if word == target else word for word in command])
            os.replace(made, target)

    def _link(self, words: list[str]) -> Future[None]:
        inputs = [word for word in words if word in self._jobs]
        shared = list(dict.fromkeys(self._shared[w] for w in inputs if w in self._shared))
        before = [self._jobs[name] for name in (*inputs, *shared)]
        command = [_real(word) if word in inputs else word for word in words]
        command[1:1] = [*_linker(), *shared]
        if "-ltorch_cpu" in words:
            if STUBS not in self._jobs:
                self._jobs[STUBS] = self._pool.submit(self._make_stubs, words[0])
            before.append(self._jobs[STUBS])
            command[1:1] = ["-Wl,--no-as-needed", f"-L{self._store / STUBS}"]  # before torch's

        def link() -> None:
            for job in before:  # queued earlier, so each has a worker of its own or is done
                job.result()
            self._run(command)

        return self._pool.submit(link)

    def _make_stubs(self, compiler: str) -> None:
        """Libraries named as torch's are, and empty: all that a link takes of those is the name.

        To open torch's own and look for what it lacks takes two thirds of the time of a link.
        """
        if (self._store / STUBS).is_dir():
            return
        with tempfile.TemporaryDirectory(dir=self._store, prefix=".build-") as work:
            made = Path(work) / STUBS
            made.mkdir()
            (Path(work) / "empty.cpp").touch()
            for name in ("libtorch.so", "libtorch_cpu.so"):
                flags = ["-shared", f"-Wl,-soname,{name}", "-o", str(made / name)]
                self._run([compiler, str(Path(work) / "empty.cpp"), *flags])
            with contextlib.suppress(OSError):  # another process was first
                made.rename(self._store / STUBS)

    def _run(self, command: list[str]) -> None:
        if self._stopped:
            raise BuildFailed("stopped")
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._running.add(process)
        text, _ = process.communicate()
        self._running.discard(process)
        if process.returncode != 0:
            raise BuildFailed(f"{command[0]} ended with {process.returncode}: {text[-4000:]}")


@contextlib.contextmanager
def side_by_side(store: Path, workers: int, *, precompile: bool = False) -> Iterator[Builds]:
    """Within: Inductor's compiler runs are queued; what is left at the end is stopped."""
    from torch._inductor import cpp_builder, cpu_vec_isa

    builds = Builds(store, workers, precompile=precompile)
    try:
        with (
            mock.patch.object(cpp_builder, "run_compile_cmd", builds.take),
            # Questions that cost a run of the compiler and of Python each. Their libraries would
            # be empty yet, so the answer would be the same.
            mock.patch.object(cpu_vec_isa.VecISA, "check_build", return_value=False),
        ):
            yield builds
    finally:
        builds.stop()


def _halves(wrapper: Path) -> tuple[str, str] | None:
    """Files of the shared code of a wrapper, and of its own; None if it is not as expected."""
    import torch._inductor.codegen as codegen

    folder = Path(next(iter(codegen.__path__)))
    interface = folder / "aoti_runtime" / "interface.cpp"
    text = wrapper.read_text()
    if not interface.is_file() or (shared := interface.read_text()) not in text:
        return None
    before, after = text.split(shared, 1)
    own, common = wrapper.with_suffix(".own.cpp"), wrapper.with_suffix(".runtime.cpp")
    own.write_text(before + _DECLARE + after)
    common.write_text(before + shared + _DEFINE)
    return str(common), str(own)


def _linker() -> list[str]:
    """gold takes a third of the time that ld does."""
    return ["-fuse-ld=gold"] if shutil.which("ld.gold") else []


def _real(output: str) -> str:
    """Where a run writes what Inductor believes to be at ``output`` (and removes)."""
    path = Path(output)
    return str(path.with_name(f"done-{path.name}"))


def _output(words: list[str]) -> str:
    return words[words.index("-o") + 1]
