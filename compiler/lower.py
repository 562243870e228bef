"""Lower: regions become AOTInductor packages, one self-contained file each.

A package holds kernels and wrapper as shared libraries and is opened without Inductor,
without a compiler and without pickle. Inductor writes C++ for one region after another while the
C++ compiler works on those before (`builds`). Not here: what a step is made of (`outline`), where
packages are kept (`artifact`).

    python -m fxlm.compiler.lower     makes ahead of time what every compilation shares
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxlm.compiler import sharing
from fxlm.compiler.builds import BuildFailed, side_by_side
from fxlm.compiler.cache import cache_directory, file_digest
from fxlm.compiler.errors import UnsupportedModel
from fxlm.compiler.lean import lean, lean_alone
from fxlm.compiler.outline import Region

_log = logging.getLogger(__name__)


def lower(
    regions: Mapping[Path, Region],
    store: Path,
    workers: int = 1,
    *,
    precompile: bool | None = None,
    alone: bool = False,
) -> None:
    """Compile each region and write its package (``*.pt2``).

    Args:
        regions: by the file to write.
        store: folder for work in progress.
        workers: runs of the C++ compiler at a time.
        precompile: make precompiled headers that the machine lacks; None: for several regions.
        alone: nobody else compiles in this process, ever: what no region needs is left out.

    Raises:
        UnsupportedModel: Inductor cannot compile a region; carries its message.
    """
    from torch._inductor.utils import fresh_cache

    with (
        tempfile.TemporaryDirectory(dir=store, prefix=".lower-") as work,
        fresh_cache(dir=work),  # one of our own: nothing is left behind, nobody else writes to it
        _quiet(),
        lean(),
        lean_alone() if alone else contextlib.nullcontext(),
    ):
        precompile = len(regions) > 1 if precompile is None else precompile
        try:
            with side_by_side(shared_store(store), workers, precompile=precompile) as builds:
                # The smallest first: its C++ is compiled beside Inductor's turns at the others.
                smallest = sorted(regions.items(), key=lambda r: len(r[1].graph.nodes))
                files = {path: _generate(region, _FAST) for path, region in smallest}
                builds.wait()
            for path, made in files.items():
                _package(made, Path(work), path)
        except BuildFailed as error:
            _log.warning("compiling in Inductor's own way, since %s", error)
            for path, region in regions.items():
                _package(_generate(region, {}), Path(work), path)


def shared_store(store: Path) -> Path:
    """Where the machine keeps what all compilations share: this user's cache, or else ``store``."""
    folder = cache_directory() / "headers"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return store


def _generate(region: Region, settings: Mapping[str, Any]) -> Any:
    """Have Inductor compile a region; gives the files of its package."""
    from torch._inductor import aot_compile

    module = fx.GraphModule(nn.Module(), region.graph)
    values = tuple(n.meta["val"] for n in region.graph.nodes if n.op == "placeholder")
    try:
        return aot_compile(module, values, options={**default_options(), **settings})
    except BuildFailed:
        raise
    except Exception as error:  # Inductor raises whatever its stages raise
        first = str(error).strip().splitlines()[0] if str(error) else ""
        raise UnsupportedModel(
            f"region {region.name} does not compile: {type(error).__name__}: {first}"
        ) from error


def _package(files: Any, work: Path, path: Path) -> None:
    from torch._inductor.package.package import package_aoti

    made = package_aoti(str(work / f"{path.stem}.pt2"), files)
    Path(str(made)).replace(path)


# What makes compiling faster and the result no other: precompiled headers are those of `builds`,
# which last longer than one compilation, and the compiler is taken to know the CPU's instructions
# (it has compiled our own ops for them); if it does not, Inductor's own way follows.
_FAST: dict[str, Any] = {
    "aot_inductor.precompile_headers": False,
    "cpp.vec_isa_ok": True,
}


def default_options() -> dict[str, Any]:
    """Inductor options that every region is compiled with."""
    return {
        "aot_inductor.package": True,
        "aot_inductor.compile_wrapper_opt_level": "O0",
        "size_asserts": False,
        "nan_asserts": False,
        **sharing.OPTIONS,
    }


def recipe() -> list[Any]:
    """What a package depends on beside its graph: the options, and the code that writes it."""
    files = [Path(__file__).with_name(f"{name}.py") for name in ("builds", "lean", "sharing")]
    return [default_options(), *map(file_digest, files)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inductor warns of its own internals; a user can act on none of that."""
    loggers = [logging.getLogger(n) for n in ("torch._inductor", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def prepare(workers: int = 2) -> None:
    """Make what every compilation shares on this machine, by compiling a few operations.

    About 10 s of two cores, once for a compiler and a version of torch.
    """
    from fxlm.compiler.program import new_fake_mode

    graph = fx.Graph()
    with new_fake_mode() as mode:
        value = mode.from_tensor(torch.empty(8, 64))
        x = graph.placeholder("x")
        x.meta["val"] = value
        made = graph.call_function(torch.ops.aten.relu.default, (x,))
        made.meta["val"] = torch.relu(value)
    graph.output((made,))
    with tempfile.TemporaryDirectory(prefix="fxlm-") as work:
        region = Region(name="prepare", graph=graph, digest="")
        lower({Path(work) / "made.pt2": region}, Path(work), workers, precompile=True, alone=True)


if __name__ == "__main__":
    prepare()
