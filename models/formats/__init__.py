"""Formats of quantized checkpoints: raw tensors of the files become tensors of a dense model.

A format is one file with one function

    read(checkpoint, config) -> dict of LogicalTensor by name

that looks at the raw tensors' names and gives those tensors of the dense checkpoint that it can
make, e.g. ``model.layers.0.mlp.up_proj.weight`` from ``….weight_packed`` and ``….weight_scale``.
``build`` is ordinary tensor code that ends in ``fxlm::dequantize`` (to float32; the cast to the
model's type is added later and folded); it runs on real, meta and traced tensors, so it must not
look at values. It becomes graph code on the weight side. Everything else of the checkpoint
passes through as it is.

Here: the registry, how a checkpoint says what it is, and checks that formats share. Not here:
names of a model's parameters (`fxlm.models.binding`), the ops (`fxlm.compiler.ops.quantized`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxlm.compiler.errors import InvalidModel

if TYPE_CHECKING:
    import torch

    from fxlm.models.checkpoint import Checkpoint
    from fxlm.models.gguf_file import GgufTensor
    from fxlm.models.safetensors_file import TensorInfo

# quant_method -> module with `read`; a line a format.
FORMATS: dict[str, str] = {
    "awq": "fxlm.models.formats.awq",
    "bitsandbytes": "fxlm.models.formats.bitsandbytes",
    "compressed-tensors": "fxlm.models.formats.compressed_tensors",
    "fbgemm_fp8": "fxlm.models.formats.fp8",
    "fp8": "fxlm.models.formats.fp8",
    "gguf": "fxlm.models.formats.gguf",
    "gptq": "fxlm.models.formats.gptq",
    "modelopt": "fxlm.models.formats.fp8",
    "mxfp4": "fxlm.models.formats.mxfp4",
}
# Where checkpoints say how they are quantized if config.json does not: file -> quant_method.
SIDE_FILES = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
_SHOWN = 3  # names listed in an error


@dataclass(frozen=True, kw_only=True, slots=True)
class LogicalTensor:
    """A tensor of the dense checkpoint.

    Attributes:
        name: as a dense checkpoint would have it.
        dtype: of what ``build`` returns.
        shape: likewise.
        sources: raw tensors that it is made of.
        build: from the raw tensors, in the order of ``sources``, to the tensor.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    build: Callable[..., torch.Tensor]


def quantization_of(checkpoint: Checkpoint) -> tuple[str, Mapping[str, Any]] | None:
    """The quantization method that a checkpoint states, and its settings; None: it is dense.

    Raises:
        InvalidModel: what it states is not an object, or names no method.
    """
    from fxlm.models.checkpoint import read_json

    config = checkpoint.config
    nested = config.get("text_config") or {}
    for owner in (config, nested):
        for key in ("quantization_config", "compression_config"):
            if owner.get(key):
                return _method(checkpoint, key, owner[key])
    for file, method in SIDE_FILES.items():
        if (checkpoint.path / file).is_file():
            return method, read_json(checkpoint.path / file)
    return None


def _method(checkpoint: Checkpoint, key: str, settings: Any) -> tuple[str, Mapping[str, Any]]:
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method is None and key == "compression_config":
        method = "compressed-tensors"  # which first wrote under this key, and named no method
    if not isinstance(method, str):
        raise InvalidModel(f"{key} of {checkpoint.path} names no quant_method: {settings!r}")
    return method, settings


def logical_tensors(checkpoint: Checkpoint) -> dict[str, LogicalTensor]:
    """Every tensor of the dense checkpoint that this one stands for, by name.

    Raises:
        InvalidModel: an unknown method, or tensors that do not fit it; names them.
    """
    made = _read(checkpoint)
    consumed = {source for tensor in made.values() for source in tensor.sources}
    plain = {
        name: LogicalTensor(
            name=name, dtype=info.torch_dtype, shape=info.shape, sources=(name,), build=_as_it_is
        )
        for name, info in checkpoint.tensors.items()
        if name not in consumed and name not in made
    }
    return {**plain, **made}


def _read(checkpoint: Checkpoint) -> dict[str, LogicalTensor]:
    found = quantization_of(checkpoint)
    if found is None:
        return {}
    method, settings = found
    if method not in FORMATS:
        raise InvalidModel(
            f"{checkpoint.path} is quantized with {method!r}, which is not read; there are "
            f"{', '.join(sorted(FORMATS))}. Use a checkpoint in one of these or a dense one "
            "(--quantization quantizes it while loading)"
        )
    module = importlib.import_module(FORMATS[method])
    made: dict[str, LogicalTensor] = module.read(checkpoint, settings)
    return made


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


# ---- shared by formats -----------------------------------------------------------------------


def require(
    checkpoint: Checkpoint,
    name: str,
    *,
    dtypes: tuple[str, ...],
    shape: tuple[int, ...] | None = None,
    why: str = "",
) -> TensorInfo | GgufTensor:
    """A raw tensor of one of these types (safetensors spelling) and of this shape.

    Raises:
        InvalidModel: it is absent, or is something else.
    """
    info = checkpoint.tensors.get(name)
    because = f" ({why})" if why else ""
    if info is None:
        raise InvalidModel(f"{checkpoint.path} lacks tensor {name!r}{because}")
    if info.dtype not in dtypes:
        raise InvalidModel(
            f"tensor {name!r} of {checkpoint.path} is {info.dtype}, must be "
            f"{' or '.join(dtypes)}{because}"
        )
    if shape is not None and info.shape != shape:
        raise InvalidModel(
            f"tensor {name!r} of {checkpoint.path} has shape {list(info.shape)}, must be "
            f"{list(shape)}{because}"
        )
    return info


def matrix(checkpoint: Checkpoint, name: str, *, dtypes: tuple[str, ...]) -> tuple[int, int]:
    """The shape of a raw tensor that must be of one of these types and have two dimensions.

    Raises:
        InvalidModel: it is absent, or is something else.
    """
    shape = require(checkpoint, name, dtypes=dtypes).shape
    if len(shape) != 2 or 0 in shape:
        raise refuse(checkpoint, f"{name} has shape {list(shape)}, must be a matrix")
    return shape[0], shape[1]


def num_groups(checkpoint: Checkpoint, inputs: int, size: Any) -> int:
    """How many groups of ``size`` (-1: all) make that many inputs.

    Raises:
        InvalidModel: no such size.
    """
    if type(size) is not int or size < -1 or size == 0:
        raise refuse(checkpoint, f"group_size={size!r} of its quantization; use -1 or a count")
    return 1 if size == -1 else -(-inputs // size)


def refuse(checkpoint: Checkpoint, reason: str) -> InvalidModel:
    """The error for a checkpoint whose settings cannot be read."""
    return InvalidModel(f"{checkpoint.path} cannot be read: {reason}")
