"""Lower: a region becomes an AOTInductor package, one self-contained file.

The package holds kernels and wrapper as shared libraries and is opened without Inductor,
without a compiler and without pickle. Not here: what a step is made of (`outline`), where
packages are kept (`artifact`).
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import fx, nn

from fxlm.compiler.errors import UnsupportedModel
from fxlm.compiler.outline import Region


def lower(region: Region, path: Path, options: dict[str, Any] | None = None) -> None:
    """Compile ``region`` and write the package to ``path`` (``*.pt2``).

    Raises:
        UnsupportedModel: Inductor cannot compile the region; carries its message.
    """
    from torch._inductor import aot_compile
    from torch._inductor.package.package import package_aoti

    module = fx.GraphModule(nn.Module(), region.graph)
    values = tuple(n.meta["val"] for n in region.graph.nodes if n.op == "placeholder")
    settings = {**default_options(), **(options or {})}
    with tempfile.TemporaryDirectory(dir=path.parent) as work, _quiet():
        try:
            files: Any = aot_compile(module, values, options=settings)
        except Exception as error:  # Inductor raises whatever its stages raise
            first = str(error).strip().splitlines()[0] if str(error) else ""
            raise UnsupportedModel(
                f"region {region.name} does not compile: {type(error).__name__}: {first}"
            ) from error
        package = package_aoti(str(Path(work) / "region.pt2"), files)
        Path(str(package)).replace(path)


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
