"""`fxlm quantize`: round a checkpoint, say what that costs layer by layer, write the result.

The layers and their schemes are those of the pass `quantize`, chosen on the captured graph. The
error of a layer is relative: that of its weight, and, over calibration text, that of its output
(rounded inputs included). A budget leaves the layers alone whose error is larger. Not here: the
files (`fxlm.models.formats.write_compressed`), rounding while loading (``--quantization``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fxlm.compiler.artifact import Artifact
from fxlm.compiler.errors import InvalidModel, InvalidOption
from fxlm.compiler.ops.quantized import round_rows
from fxlm.compiler.options import CompileOptions, resolve_dtype
from fxlm.compiler.program import Program
from fxlm.compiler.schemes import Scheme
from fxlm.models.checkpoint import Checkpoint, open_checkpoint
from fxlm.models.formats.write_compressed import round_weight, write_compressed

MAX_CALIBRATION_TOKENS = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One linear layer, before and after.

    Attributes:
        path: of its module.
        scheme: it gets; None: it stays as it is.
        reason: why it stays, or ``""``.
        source: raw name of its weight, ``""`` if it has none of its own.
        weight_error: relative error of the weight; None if it was not tried.
        output_error: relative error of the output over the calibration text, if there was one.
    """

    path: str
    scheme: Scheme | None
    reason: str = ""
    source: str = ""
    weight_error: float | None = None
    output_error: float | None = None

    @property
    def error(self) -> float:
        """What a budget is held against: the output's error if it is known."""
        known = self.weight_error if self.output_error is None else self.output_error
        return known or 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What `quantize_checkpoint` did: the layers in graph order, bytes of tensors."""

    layers: list[Layer]
    bytes_before: int
    bytes_after: int
    num_tokens: int

    def lines(self) -> list[str]:
        """A table for people: a line a layer, and a summary."""
        width = max(len(layer.path) for layer in self.layers)
        lines = [f"{'layer':<{width}}  {'scheme':<14}{'weight':>9}{'output':>9}  relative error"]
        lines += [_line(layer, width) for layer in self.layers]
        count = sum(layer.scheme is not None for layer in self.layers)
        share = self.bytes_after / self.bytes_before
        lines.append(f"{count} of {len(self.layers)} linear layers quantized; "
                     f"{self.bytes_before / 2**20:.1f} -> {self.bytes_after / 2**20:.1f} MiB "
                     f"({share:.0%})")  # fmt: skip
        if self.num_tokens:
            lines.append(f"outputs measured over {self.num_tokens} tokens")
        return lines


def _line(layer: Layer, width: int) -> str:
    scheme = layer.scheme.name if layer.scheme else "-"
    errors = "".join(
        f"{'' if error is None else format(error, '.4f'):>9}"
        for error in (layer.weight_error, layer.output_error)
    )
    return f"{layer.path:<{width}}  {scheme:<14}{errors}  {layer.reason}".rstrip()


def quantize_checkpoint(
    model: str,
    scheme: str,
    output: Path,
    *,
    calibration: Path | None = None,
    budget_error: float | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Outcome:
    """Write a rounded copy of a checkpoint.

    Args:
        model: directory, hub id or bundled name of a dense checkpoint.
        scheme: as ``--quantization`` takes it.
        output: new directory.
        calibration: text file; its first `MAX_CALIBRATION_TOKENS` tokens are run.
        budget_error: layers with a larger relative error stay as they are.

    Raises:
        InvalidOption, InvalidModel: see the messages.
    """
    from fxlm.compiler import ops

    ops.load()
    if budget_error is not None and not 0 < budget_error < math.inf:
        raise InvalidOption("--budget-error", budget_error, "must be more than 0, e.g. 0.05")
    if output.exists():
        raise InvalidOption("--output", str(output), "it exists; name a new directory")
    checkpoint = open_checkpoint(model, revision, trust_remote_code)
    program, stored = _program(checkpoint)
    ids = _tokens(checkpoint, calibration) if calibration is not None else []
    layers = _measured(program, checkpoint, scheme, stored, ids)
    if budget_error is not None:
        layers = [_within(layer, budget_error) for layer in layers]
    chosen = {layer.source: layer.scheme for layer in layers if layer.scheme is not None}
    if not chosen and budget_error is None:
        reason = next((layer.reason for layer in layers if layer.reason), "it has no layers")
        raise InvalidOption("--scheme", scheme, f"nothing can be quantized: {reason}")
    if not chosen:
        raise InvalidOption("--budget-error", budget_error, "no layer's error is that small")
    ignored = [layer.path for layer in layers if layer.scheme is None]
    written = write_compressed(checkpoint, output, chosen, ignored, stored)
    return Outcome(
        layers=layers,
        bytes_before=checkpoint.num_bytes,
        bytes_after=written,
        num_tokens=len(ids),
    )


def _within(layer: Layer, budget: float) -> Layer:
    if layer.scheme is None or layer.error <= budget:
        return layer
    return replace(layer, scheme=None, reason=f"its error is more than {budget:g}")


def _program(checkpoint: Checkpoint) -> tuple[Program, torch.dtype]:
    """The model as a graph over tensors of the file in float32, and the file's own type."""
    from fxlm.compiler.pipeline import run
    from fxlm.models.formats import quantization_of
    from fxlm.runtime.front import front, stored_dtype

    found = quantization_of(checkpoint)
    if found is not None:
        raise InvalidModel(f"{checkpoint.path} is quantized already ({found[0]}); name a dense one")
    started = front(checkpoint, CompileOptions(dtype="float32"))
    run(started.program, [p for p in started.column if p.name in ("bind_checkpoint", "cleanup")])
    dtype, _ = resolve_dtype("auto", stored_dtype(checkpoint), "cuda")  # float16 stays float16
    return started.program, dtype


def _tokens(checkpoint: Checkpoint, file: Path) -> list[int]:
    from fxlm.models.tokenizer import Tokenizer

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidOption("--calibration", str(file), f"it cannot be read: {error}") from error
    ids = Tokenizer.open(checkpoint.path).encode(text)[:MAX_CALIBRATION_TOKENS]
    if len(ids) < 2:
        raise InvalidOption("--calibration", str(file), "it has fewer than two tokens")
    return ids


def describe(option: str | None, checkpoint: Checkpoint, artifact: Artifact) -> tuple[str, str]:
    """How the weights of a compiled model are quantized, for people: a name, and what it means."""
    from fxlm.models.formats import quantization_of

    found = quantization_of(checkpoint)
    if option is None and found is None:
        return "none", "the checkpoint is dense"
    runs = {line["name"]: line["rewrites"] for line in artifact.manifest["passes"]}
    ops = [line[2] for line in artifact.read_json("load.json")["graph"] if line[0] == "op"]
    fused, dense = runs.get("fuse_quantized_linear", 0), ops.count("fxlm.dequantize.default")
    why = f"{fused} weights are read as they are"
    if dense:
        why += f", {dense} are dequantized while loading"
    names = [*([found[0]] if found else []), *([option] if option else [])]
    return " + ".join(names), why


# ---- measuring -------------------------------------------------------------------------------


def _measured(
    program: Program, checkpoint: Checkpoint, scheme: str, stored: torch.dtype, ids: list[int]
) -> list[Layer]:
    """Every linear layer with its errors, in graph order."""
    from fxlm.compiler.watch import run_watched
    from fxlm.passes.quantize import choose

    choices = choose(program, scheme)
    layers: dict[Any, Layer] = {c.node: _layer(program, c) for c in choices}

    def measure(node: Any) -> Callable[..., None]:
        def watch(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> None:
            layers[node] = _errors(layers[node], weight, stored, x if ids else None)

        return watch

    todo = [c for c in choices if layers[c.node].scheme is not None]
    if ids:
        run_watched(program, checkpoint.read, ids, {c.node: measure(c.node) for c in todo})
    else:
        for choice in todo:
            weight = checkpoint.read(layers[choice.node].source).float()
            measure(choice.node)(torch.empty(0), weight)
    return list(layers.values())


def _layer(program: Program, choice: Any) -> Layer:
    """A layer that has a weight of its own in the file, or the reason why it stays."""
    layer = Layer(path=choice.path, scheme=choice.scheme, reason=choice.reason)
    if choice.scheme is None:
        return layer
    weight = choice.weight
    while weight.target in (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default):
        weight = weight.args[0]
    if weight.op != "placeholder":
        return replace(layer, scheme=None, reason="the file has its weight in another form")
    source = program.inputs[weight.name].source
    if len(weight.users) > 1 or not source.endswith(".weight"):
        return replace(layer, scheme=None, reason=f"{source} serves elsewhere too")
    return replace(layer, source=source)


def _errors(
    layer: Layer, weight: torch.Tensor, stored: torch.dtype, x: torch.Tensor | None
) -> Layer:
    """Round one weight and see what changes."""
    assert layer.scheme is not None, layer
    rounded = round_weight(weight, layer.scheme, stored).dense()
    found = replace(layer, weight_error=_relative(rounded, weight))
    if x is None:
        return found
    inputs = x.float()
    if layer.scheme.activation == "int8":
        codes, scale = round_rows(inputs)
        inputs = codes * scale
    return replace(found, output_error=_relative(inputs @ rounded.t(), x.float() @ weight.t()))


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))
