"""C++ runs that are queued: what Inductor sees, what is there in the end, and failures."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

from fxlm.compiler.builds import BuildFailed, Builds, _halves


@pytest.fixture
def builds(tmp_path: Path) -> Iterator[Builds]:
    made = Builds(tmp_path, workers=2)
    yield made
    made.stop()


def source(tmp_path: Path, text: str) -> tuple[Path, Path]:
    file = tmp_path / "one.cpp"
    file.write_text(text)
    return file, tmp_path / "one.o"


def test_a_library_is_there_once_waited_for(builds: Builds, tmp_path: Path) -> None:
    file, object_file = source(tmp_path, 'extern "C" int answer() { return 42; }\n')
    library = tmp_path / "one.so"
    builds.take(f"g++ -fPIC -c {file} -o {object_file}", str(tmp_path))
    builds.take(f"g++ -shared {object_file} -o {library}", str(tmp_path))
    object_file.unlink()  # as Inductor does, which believes that it was linked
    builds.wait()
    assert ctypes.CDLL(str(library)).answer() == 42


def test_a_library_names_torch_without_a_look_at_it(builds: Builds, tmp_path: Path) -> None:
    file, object_file = source(tmp_path, "int nowhere(); int answer() { return nowhere(); }\n")
    library = tmp_path / "one.so"
    builds.take(f"g++ -fPIC -c {file} -o {object_file}", str(tmp_path))
    builds.take(f"g++ -shared {object_file} -o {library} -ltorch_cpu -L/nowhere", str(tmp_path))
    builds.wait()
    assert b"libtorch_cpu.so" in library.read_bytes()


def test_a_failed_run_shows_what_the_compiler_said(builds: Builds, tmp_path: Path) -> None:
    file, object_file = source(tmp_path, "int answer() { return nowhere; }\n")
    builds.take(f"g++ -c {file} -o {object_file}", str(tmp_path))
    with pytest.raises(BuildFailed, match="nowhere"):
        builds.wait()


def test_nothing_starts_once_stopped(tmp_path: Path) -> None:
    builds = Builds(tmp_path, workers=1)
    builds.stop()
    file, object_file = source(tmp_path, "int answer;\n")
    with pytest.raises(RuntimeError):
        builds.take(f"g++ -c {file} -o {object_file}", str(tmp_path))


def test_a_wrapper_is_divided_where_torch_put_its_runtime(tmp_path: Path) -> None:
    import torch._inductor.codegen as codegen

    shared = (Path(codegen.__path__[0]) / "aoti_runtime" / "interface.cpp").read_text()
    wrapper = tmp_path / "x.wrapper.cpp"
    wrapper.write_text(f"// head\n{shared}// own\n")
    halves = _halves(wrapper)
    assert halves is not None
    common, own = (Path(half).read_text() for half in halves)
    assert common.startswith("// head\n")
    assert shared in common
    assert "// own" not in common
    assert shared not in own
    assert own.endswith("// own\n")


def test_a_wrapper_of_another_form_stays_whole(tmp_path: Path) -> None:
    wrapper = tmp_path / "x.wrapper.cpp"
    wrapper.write_text("int main() {}\n")
    assert _halves(wrapper) is None
