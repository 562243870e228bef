"""Lower: regions become AOTInductor packages, one self-contained file each.

A package holds kernels and wrapper as shared libraries and is opened without Inductor,
without a compiler and without pickle. Inductor writes C++ for one region after another while the
C++ compiler works on those before (`builds`). Not here: what a step is made of (`outline`), where
packages are kept (`artifact`).
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import fx, nn

from fxlm.compiler.builds import BuildFailed, side_by_side
from fxlm.compiler.errors import UnsupportedModel
from fxlm.compiler.outline import Region

_log = logging.getLogger(__name__)


def lower(regions: Mapping[Path, Region], store: Path, workers: int = 1) -> None:
    """Compile each region and write its package (``*.pt2``).

    Args:
        regions: by the file to write.
        store: folder for work in progress, and for code that regions share.
        workers: runs of the C++ compiler at a time.

    Raises:
        UnsupportedModel: Inductor cannot compile a region; carries its message.
    """
    from torch._inductor.utils import fresh_cache

    with (
        tempfile.TemporaryDirectory(dir=store, prefix=".lower-") as work,
        fresh_cache(dir=work),  # one of our own: nothing is left behind, nobody else writes to it
        _quiet(),
    ):
        try:
            _side_by_side(regions, store, Path(work), workers)
        except BuildFailed as error:
            _log.warning("compiling in Inductor's own way, since %s", error)
            for path, region in regions.items():
                _package(_generate(region, {}), Path(work), path)


def _side_by_side(regions: Mapping[Path, Region], store: Path, work: Path, workers: int) -> None:
    with side_by_side(store, workers, precompile=len(regions) > 1) as builds:
        files = {path: _generate(region, _FAST) for path, region in regions.items()}
        builds.wait()
    for path, made in files.items():
        _package(made, work, path)


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
    }


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
