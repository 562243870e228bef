"""Write a checkpoint in compressed-tensors' format: some weights rounded, the rest as it was.

Which compression format a scheme gets is what the library itself infers: int-quantized where
inputs are rounded to int8, pack-quantized for other integers, naive-quantized for fp8. Scales are
in the checkpoint's own 16-bit type, and weights are rounded against those very scales. Not here:
choosing schemes and measuring errors (`fxlm.runtime.quantize`), reading
(`fxlm.models.formats.compressed_tensors`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fxlm.compiler.errors import InvalidOption
from fxlm.compiler.ops import quantized as ops
from fxlm.compiler.schemes import Scheme
from fxlm.models.checkpoint import INDEX, SINGLE, Checkpoint
from fxlm.models.formats.bits import pack_words

SHARD_BYTES = 4 << 30  # most of one file
NOT_COPIED = {"config.json", SINGLE, INDEX}
TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounded:
    """A weight in rounded form: (codes - zero) * scale.

    Attributes:
        codes: int8 or float8_e4m3fn [N, K].
        scale: float32, one a block; its values are exact in the type of the file.
        zero: alike, integers; None if symmetric.
        scheme: that made it.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    scheme: Scheme

    def dense(self) -> torch.Tensor:
        """The weight, float32."""
        offset = None if self.zero is None else -self.zero * self.scale
        scheme = self.scheme
        return ops.dequantize(
            self.codes, self.scale, offset, None, scheme.bits, scheme.block, torch.float32, "none"
        )


def round_weight(weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Rounded:
    """Round a weight [N, K] by a scheme that is fitted to it."""
    if scheme.kind == "fp8":
        codes, scale = ops.round_fp8(weight, scheme.block, scale_dtype)
        return Rounded(codes=codes, scale=scale, zero=None, scheme=scheme)
    group, symmetric = scheme.block[1], scheme.symmetric
    codes, scale, zero = ops.round_int(weight, scheme.bits, group, symmetric, scale_dtype)
    return Rounded(codes=codes, scale=scale, zero=None if symmetric else zero, scheme=scheme)


def write_compressed(
    checkpoint: Checkpoint,
    output: Path,
    schemes: Mapping[str, Scheme],
    ignored: Sequence[str],
    scale_dtype: torch.dtype,
) -> int:
    """Write the checkpoint; returns bytes of its tensors.

    Args:
        checkpoint: dense.
        output: a directory that does not exist or is empty.
        schemes: by raw name of the weight (``….weight``), fitted.
        ignored: modules of linear layers that stay as they are.
        scale_dtype: of the scales in the file.

    Raises:
        InvalidOption: the directory holds something, or cannot be made.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InvalidOption("--output", str(output), "it exists and is not empty; name a new one")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"it cannot be made ({error.strerror}); name a directory that you may write"
        raise InvalidOption("--output", str(output), reason) from error
    total = _write_shards(output, _tensors(checkpoint, schemes, scale_dtype))
    _copy_texts(checkpoint.path, output)
    config = {**checkpoint.config, "quantization_config": settings(schemes, ignored)}
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return total


def _copy_texts(source: Path, output: Path) -> None:
    """Tokenizer, template and defaults: what is small text beside the config."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in TEXTS and file.name not in NOT_COPIED:
            shutil.copyfile(file, output / file.name)


# ---- settings --------------------------------------------------------------------------------


def settings(schemes: Mapping[str, Scheme], ignored: Sequence[str]) -> dict[str, Any]:
    """``quantization_config`` of config.json."""
    members: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        members.setdefault(scheme, []).append(name.removesuffix(".weight"))
    alone = len(members) == 1
    groups = {
        f"group_{index}": _group(scheme, ["Linear"] if alone else names)
        for index, (scheme, names) in enumerate(members.items())
    }
    formats = {_format(scheme) for scheme in members}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _format(scheme: Scheme) -> str:
    if scheme.kind == "fp8":
        return "naive-quantized"
    return "int-quantized" if scheme.activation == "int8" else "pack-quantized"


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": scheme.bits, "type": "float" if scheme.kind == "fp8" else "int",
        "symmetric": scheme.symmetric, "strategy": _strategy(scheme), "dynamic": False,
    }  # fmt: skip
    if _strategy(scheme) == "group":
        weights["group_size"] = scheme.block[1]
    if _strategy(scheme) == "block":
        weights["block_structure"] = list(scheme.block)
    tokens = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": tokens if scheme.activation == "int8" else None,
        "output_activations": None,
        "format": _format(scheme),
    }


def _strategy(scheme: Scheme) -> str:
    rows, columns = scheme.block
    if rows > 1:
        return "block"
    if columns > 0:
        return "group"
    return "channel" if rows == 1 else "tensor"


# ---- tensors ---------------------------------------------------------------------------------


def _tensors(
    checkpoint: Checkpoint, schemes: Mapping[str, Scheme], scale_dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in checkpoint.tensors:
        tensor = checkpoint.read(name)
        if name not in schemes:
            yield name, tensor
            continue
        rounded = round_weight(tensor, schemes[name], scale_dtype)
        yield from _stored(name.removesuffix(".weight"), rounded, scale_dtype)


def _stored(
    module: str, weight: Rounded, scale_dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one quantized layer, as the format has them."""
    scheme = weight.scheme
    packs, half = _format(scheme) == "pack-quantized", 1 << (scheme.bits - 1)
    if packs:
        yield f"{module}.weight_packed", pack_words(weight.codes, scheme.bits, half)
        yield f"{module}.weight_shape", torch.tensor(weight.codes.shape)
    else:
        yield f"{module}.weight", weight.codes
    scale = weight.scale.to(scale_dtype)
    yield f"{module}.weight_scale", scale.view(1) if _strategy(scheme) == "tensor" else scale
    if weight.zero is not None:
        zero = weight.zero.to(torch.int8)
        packed = pack_words(zero.t(), scheme.bits, half).t() if packs else zero
        yield f"{module}.weight_zero_point", packed.contiguous()


def _write_shards(output: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> int:
    """Write tensors as they come, so that little is held; returns their bytes."""
    held: dict[str, torch.Tensor] = {}
    shards: list[list[str]] = []
    total = pending = 0

    def flush() -> None:
        shards.append(list(held))
        path = output / f"shard-{len(shards)}.safetensors"
        save_file({n: t.contiguous() for n, t in held.items()}, path, {"format": "pt"})
        held.clear()

    for name, tensor in tensors:
        if held and pending + tensor.nbytes > SHARD_BYTES:
            flush()
            pending = 0
        held[name] = tensor
        pending += tensor.nbytes
        total += tensor.nbytes
    flush()
    _name_shards(output, shards, total)
    return total


def _name_shards(output: Path, shards: list[list[str]], total: int) -> None:
    """One file is ``model.safetensors``; several get numbers and an index."""
    if len(shards) == 1:
        (output / "shard-1.safetensors").rename(output / SINGLE)
        return
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for index, name in enumerate(names):
        (output / f"shard-{index + 1}.safetensors").rename(output / name)
    places = {tensor: name for name, held in zip(names, shards, strict=True) for tensor in held}
    index_text = {"metadata": {"total_size": total}, "weight_map": places}
    (output / INDEX).write_text(json.dumps(index_text, indent=2) + "\n")
