"""Everything of transformers that is patched rather than called, in one place.

Tried with transformers 5.17 to 5.23. Here: building without weights, and the names that
moved between versions. Not here: what is registered through a public interface
(`fxlm.models.attention`, `fxlm.models.experts`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


def import_transformers() -> None:
    """Import transformers, which looks for ``__all__`` in its 1,600 files, twice, line by line.

    Its own package file asks for that before anybody could change how it is done, so the module
    that does it is imported first, from the package as it is when that file begins.
    """
    if "transformers" in sys.modules:
        return
    spec = importlib.util.find_spec("transformers")
    assert spec is not None, "transformers is not installed"
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    package.__dict__["__version__"] = importlib.metadata.version("transformers")
    sys.modules["transformers"] = package
    try:
        from transformers.utils import import_utils

        _look_once(import_utils)
        spec.loader.exec_module(package)
    except BaseException:
        sys.modules.pop("transformers", None)
        raise


def _look_once(utils: Any) -> None:
    """Let each folder be looked into once, and a file be read from its ``__all__`` on."""
    whole: Callable[[str], list[str]] = utils.fetch__all__
    in_folder = getattr(utils.create_import_structure_from_path, "__wrapped__", None)

    def names(content: str) -> list[str]:
        start = content.rfind("\n__all__") + 1
        return whole(content[start:]) if start or content.startswith("__all__") else []

    utils.fetch__all__ = names
    if in_folder is not None:  # its cache has room for fewer folders than there are
        utils.create_import_structure_from_path = functools.cache(in_folder)


@contextlib.contextmanager
def meta_parameters() -> Iterator[None]:
    """Within: every parameter a module registers goes to the meta device, uninitialised.

    Buffers stay real, as their values (rotary frequencies, scales) come from code rather
    than from the checkpoint. A parameter's own memory is freed as soon as it is registered;
    what ``torch.empty`` gave was never touched, so it was never resident.
    """
    from transformers.initialization import no_init_weights

    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        with no_init_weights():
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def initialize_buffers(model: Any) -> None:
    """Compute buffers once more, as ``from_pretrained`` does after its dtype context is over.

    Within that context a table computed in the default dtype is rounded to bfloat16, outside
    of it is not; the values of ``from_pretrained`` are the true ones.
    """
    from transformers import PreTrainedModel

    owners = {name: m for name, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    with torch.no_grad():
        for name, module in model.named_modules():
            if not any(buffer is not None for buffer in module._buffers.values()):
                continue
            inside = [o for o in owners if o in ("", name) or name.startswith(f"{o}.")]
            owners[max(inside, key=len)]._init_weights(module)


def keep_in_fp32(model: Any, dtype: torch.dtype) -> list[str]:
    """Patterns of the parameters that the model wants in float32 whatever its dtype."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    return [pattern for pattern, wanted in plan.items() if wanted == torch.float32]


def quiet() -> None:
    """Silence transformers' advice on the terminal; errors still are raised."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def conversion_mapping(model: Any) -> list[Any]:
    """Weight renamings and conversions of this model, in transformers' order."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping: list[Any] = list(get_model_conversion_mapping(model))
    return mapping
