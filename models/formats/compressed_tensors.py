"""compressed-tensors checkpoints (vLLM's llm-compressor and others).

https://github.com/vllm-project/compressed-tensors. Read are the formats int-quantized,
float-quantized and naive-quantized (``weight`` int8 or float8_e4m3fn) and pack-quantized
(``weight_packed`` int32 [N, K * bits / 32], ``weight_shape``), each with ``weight_scale`` and, if
asymmetric, ``weight_zero_point``; scales per tensor, channel, group or block. Which layers are
quantized shows in the tensors, so ``ignore`` needs no reading; ``config_groups`` says how.

Inputs that the checkpoint rounds to int8 are rounded per token as the model runs, static scales
of the file included; those it would round to fp8 stay 16-bit, which CPUs multiply anyway. Not
read: 3-, 5- to 7-bit codes, fp4 and mx formats, sparsity, transforms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fxlm.compiler import ops
from fxlm.models.formats import LogicalTensor, refuse, require
from fxlm.models.formats.bits import require_groups, unordered, unpack_words

if TYPE_CHECKING:
    from fxlm.models.checkpoint import Checkpoint

READ = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized")
READ_TOO = ("dense", "mixed-precision")  # of a whole checkpoint; its groups say the rest
FLOATS = ("BF16", "F16", "F32")
PACKED_BITS = (2, 4, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """One of ``config_groups``: which layers, and how their weights and inputs are rounded."""

    name: str
    targets: tuple[str, ...]
    floating: bool
    bits: int
    symmetric: bool
    strategy: str
    group_size: int
    block: tuple[int, int]
    activation: str

    @property
    def dtype(self) -> str:
        """Type of unpacked codes, in safetensors' spelling."""
        return "F8_E4M3" if self.floating else "I8"

    def scale_block(self) -> tuple[int, int]:
        """(outputs, inputs) that share a scale; 0: all."""
        by_strategy = {
            "tensor": (0, 0), "channel": (1, 0), "group": (1, self.group_size),
            "block": self.block,
        }  # fmt: skip
        return by_strategy[self.strategy]


def read(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, LogicalTensor]:
    """The dense weights that the quantized layers stand for; see `fxlm.models.formats`.

    Raises:
        InvalidModel: settings that are not read, or tensors that do not fit them.
    """
    ops.load()
    _refuse_unread(checkpoint, config)
    stated = config.get("config_groups") or {}
    if not isinstance(stated, dict):
        raise refuse(checkpoint, f"config_groups is {stated!r}, must be an object of groups")
    groups = [_group(checkpoint, n, g) for n, g in stated.items()]
    made = {}
    for name, info in checkpoint.tensors.items():
        if name.endswith(".weight_packed"):
            module = name.removesuffix(".weight_packed")
            made[f"{module}.weight"] = _packed(
                checkpoint, module, _find(checkpoint, groups, module)
            )
        elif name.endswith(".weight") and info.dtype in ("I8", "F8_E4M3"):
            module = name.removesuffix(".weight")
            made[name] = _plain(checkpoint, module, _find(checkpoint, groups, module))
    return made


# ---- settings --------------------------------------------------------------------------------


def _refuse_unread(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    form = config.get("format", "dense")
    if form not in (*READ, *READ_TOO):
        raise refuse(checkpoint, f"compressed-tensors format {form!r}; read are {', '.join(READ)}")
    for key in ("sparsity_config", "transform_config"):
        if not isinstance(config.get(key) or {}, dict):
            raise refuse(checkpoint, f"{key} is {config[key]!r}, must be an object")
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise refuse(checkpoint, f"its weights are sparse ({sparsity})")
    if (config.get("transform_config") or {}).get("config_groups"):
        raise refuse(checkpoint, "it needs transforms of weights and inputs (transform_config)")


def _group(checkpoint: Checkpoint, name: str, settings: Any) -> _Group:
    weights = settings.get("weights") if isinstance(settings, dict) else None
    if not isinstance(weights, dict):
        raise refuse(checkpoint, f"config_groups {name!r} says nothing of weights: {settings!r}")
    form = settings.get("format")
    if form is not None and form not in READ:
        raise refuse(checkpoint, f"config_groups {name!r} has format {form!r}; read are {READ}")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    try:
        found = _Group(
            name=name,
            targets=_targets(settings.get("targets")),
            floating=weights.get("type", "int") == "float",
            bits=int(weights.get("num_bits", 8)),
            symmetric=bool(weights.get("symmetric", True)),
            strategy=strategy,
            group_size=int(weights.get("group_size") or 0),
            block=_block(weights.get("block_structure")),
            activation=_activation(weights, settings.get("input_activations")),
        )
    except (ValueError, TypeError) as error:
        raise refuse(checkpoint, f"config_groups {name!r}: {error}") from error
    if strategy not in ("tensor", "channel", "group", "block"):
        raise refuse(checkpoint, f"config_groups {name!r} has weights by {strategy!r}")
    if (found.floating and found.bits != 8) or (strategy == "group" and found.group_size < 1):
        raise refuse(checkpoint, f"config_groups {name!r} has weights {weights!r}")
    return found


def _block(structure: Any) -> tuple[int, int]:
    """``[128, 128]``, or ``"128x128"`` as older files have it."""
    sizes = structure.split("x") if isinstance(structure, str) else structure or (0, 0)
    rows, columns = (int(size) for size in sizes)
    return rows, columns


def _targets(stated: Any) -> tuple[str, ...]:
    targets = tuple(stated or ())
    for target in targets:
        if not isinstance(target, str):
            raise ValueError(f"its targets hold {target!r}, which is no text")
        try:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"target {target!r} is no regular expression: {error}") from error
    return targets


def _activation(weights: Mapping[str, Any], inputs: Any) -> str:
    """What is done to inputs: ``int8`` a token, or ``none`` (fp8 ones stay 16-bit)."""
    if not inputs:
        return "none"
    if not isinstance(inputs, dict):
        raise ValueError(f"input_activations {inputs!r}, must be an object or null")
    kind, bits = inputs.get("type", "int"), inputs.get("num_bits", 8)
    if kind == "float" and bits == 8:
        return "none"
    by = inputs.get("strategy") or "tensor"
    whole = by in ("tensor", "token") and weights.get("type", "int") == "int"
    if kind == "int" and bits == 8 and whole:
        return "int8"
    raise ValueError(
        f"input_activations of {bits!r} bits, {kind!r} by {by!r}; read are 8 bits, float, or int "
        "by token or tensor beside int weights"
    )


def _find(checkpoint: Checkpoint, groups: list[_Group], module: str) -> _Group:
    """The group of a layer: by its name, by a pattern, by its class, in this order."""
    for fits in (_by_name, _by_pattern, _is_linear, _by_class):
        for group in groups:
            if any(fits(target, module) for target in group.targets):
                return group
    raise refuse(checkpoint, f"{module} is quantized, but no config_groups target fits it")


def _by_name(target: str, module: str) -> bool:
    return target == module


def _by_pattern(target: str, module: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], module) is not None


def _is_linear(target: str, module: str) -> bool:
    return target in ("Linear", "LinearBase")


def _by_class(target: str, module: str) -> bool:
    """The class is not known here; what is written as one may be a subclass of Linear."""
    return target.isidentifier() and target[0].isupper()


# ---- tensors ---------------------------------------------------------------------------------


def _plain(checkpoint: Checkpoint, module: str, group: _Group) -> LogicalTensor:
    """``weight`` holds the codes."""
    why = f"config_groups {group.name!r}"
    info = require(checkpoint, f"{module}.weight", dtypes=(group.dtype,), why=why)
    scales = _scales(checkpoint, module, group, info.shape)

    def build(codes: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        zero = rest[1] if len(rest) > 1 else None
        return _dequantize(codes, rest[0], zero, group)

    return _logical(f"{module}.weight", info.shape, (f"{module}.weight", *scales), build)


def _packed(checkpoint: Checkpoint, module: str, group: _Group) -> LogicalTensor:
    """``weight_packed`` holds the codes, ``weight_shape`` their number."""
    why = f"config_groups {group.name!r}, {group.bits} bits"
    if group.bits not in PACKED_BITS or group.floating:
        raise refuse(checkpoint, f"{module} has {group.bits}-bit codes; read are {PACKED_BITS}")
    require(checkpoint, f"{module}.weight_shape", dtypes=("I64", "I32"), shape=(2,), why=why)
    outputs, inputs = (int(s) for s in checkpoint.read(f"{module}.weight_shape").tolist())
    words = (outputs, -(-inputs * group.bits // 32))
    if outputs < 1 or inputs < 1:
        raise refuse(checkpoint, f"{module}.weight_shape says {[outputs, inputs]}")
    require(checkpoint, f"{module}.weight_packed", dtypes=("I32",), shape=words, why=why)
    packs_zeros = group.strategy in ("group", "channel")
    scales = _scales(checkpoint, module, group, (outputs, inputs), packs_zeros)
    half, order = 1 << (group.bits - 1), _order(checkpoint, module, group, inputs)

    def build(packed: torch.Tensor, scale: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        codes = unpack_words(packed, group.bits, half)[:, :inputs]
        zero = None if group.symmetric else rest[0]
        if zero is not None and packs_zeros:
            zero = unpack_words(zero.t(), group.bits, half).t()[:outputs]
        if not order:
            return _dequantize(codes, scale, zero, group)
        return unordered(codes, rest[-1], lambda sorted: _dequantize(sorted, scale, zero, group))

    sources = (f"{module}.weight_packed", *scales, *order)
    return _logical(f"{module}.weight", (outputs, inputs), sources, build)


def _order(checkpoint: Checkpoint, module: str, group: _Group, inputs: int) -> tuple[str, ...]:
    """The tensor that says to which group each input belongs, if they are out of order."""
    name = f"{module}.weight_g_idx"
    if name not in checkpoint.tensors:
        return ()
    require(checkpoint, name, dtypes=("I32", "I64"), shape=(inputs,))
    if bool((checkpoint.read(name) < 0).all()):
        return ()  # -1: never filled in
    size = group.group_size if group.strategy == "group" else inputs
    require_groups(checkpoint, name, size, -(-inputs // size))
    return (name,)


def _scales(
    checkpoint: Checkpoint,
    module: str,
    group: _Group,
    shape: tuple[int, ...],
    packs_zeros: bool = False,
) -> tuple[str, ...]:
    """Names of ``weight_scale`` and, if there is one, ``weight_zero_point``, both checked."""
    why = f"config_groups {group.name!r} by {group.strategy}"
    outputs, inputs = shape
    rows, columns = group.scale_block()
    wanted = (-(-outputs // (rows or outputs)), -(-inputs // (columns or inputs)))
    flat = wanted[1] == 1  # one scale a row may come as [N], one a tensor as [1] or []
    scale = require(checkpoint, f"{module}.weight_scale", dtypes=FLOATS, why=why)
    short = ((wanted[0],), ()) if wanted[0] == 1 else ((wanted[0],),)
    if scale.shape != wanted and not (flat and scale.shape in short):
        require(checkpoint, scale.name, dtypes=FLOATS, shape=wanted, why=why)
    name = f"{module}.weight_zero_point"
    if group.symmetric:
        _require_no_zeros(checkpoint, name, why)
        return (scale.name,)
    if packs_zeros:
        words = (-(-outputs * group.bits // 32), wanted[1])
        require(checkpoint, name, dtypes=("I32",), shape=words, why=why)
    else:
        require(checkpoint, name, dtypes=("I8",), shape=scale.shape, why=why)
    return (scale.name, name)


def _require_no_zeros(checkpoint: Checkpoint, name: str, why: str) -> None:
    """Symmetric codes may have zero points in the file if all are 0, which says the same."""
    if name in checkpoint.tensors and bool(checkpoint.read(name).any()):
        raise refuse(
            checkpoint,
            f"{why} says symmetric: true, but {name!r} holds zero points; correct the setting to "
            "symmetric: false or download the checkpoint again",
        )


def _dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, group: _Group
) -> torch.Tensor:
    outputs, inputs = codes.shape
    rows, columns = group.scale_block()
    shape = (-(-outputs // (rows or outputs)), -(-inputs // (columns or inputs)))
    wide = scale.float().reshape(shape)
    offset = None if zero is None else zero.float().reshape(shape) * -wide
    dense: torch.Tensor = torch.ops.fxlm.dequantize(
        codes, wide, offset, None, 4 if group.bits < 8 else 8, [rows, columns], torch.float32,
        group.activation,
    )  # fmt: skip
    return dense


def _logical(
    name: str, shape: tuple[int, ...], sources: tuple[str, ...], build: Any
) -> LogicalTensor:
    return LogicalTensor(name=name, dtype=torch.float32, shape=shape, sources=sources, build=build)
