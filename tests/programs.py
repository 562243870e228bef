"""Small programs for the tests of compiler and passes: a captured tiny model, and its oracle."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from fxlm.compiler.capture import capture
from fxlm.compiler.pipeline import GraphPass
from fxlm.compiler.program import Facts, Program
from fxlm.models.build import build_model
from fxlm.models.tiny import tiny_config

VOCAB = 256
IDS = [3, 17, 99, 4, 5, 200, 17]


def tiny_model(model_type: str = "llama", **overrides: Any) -> torch.nn.Module:
    """A tiny model of the type, with parameters on meta."""
    return build_model(tiny_config(model_type, **overrides), torch.float32)


def facts(model_type: str = "llama", device: str = "cpu") -> Facts:
    """Facts as the runtime would fill them in."""
    return Facts(
        model_type=model_type, vocab_size=VOCAB, max_position_embeddings=512, num_layers=2,
        dtype=torch.float32, device=torch.device(device),
    )  # fmt: skip


def captured(model_type: str = "llama", **overrides: Any) -> Program:
    """A fresh captured program."""
    return capture(tiny_model(model_type, **overrides), facts(model_type))


@cache
def weights_of(shape_key: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, torch.Tensor]:
    """Seeded values for weights of these names and shapes."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) / max(shape[-1], 1) ** 0.5
        for name, shape in shape_key
    }


def run_dense(program: Program, ids: list[int], **inputs: torch.Tensor) -> torch.Tensor:
    """Interpret a program that has no paged attention yet; logits [1, T, V]."""
    key = tuple(
        (program.inputs[n.name].source, tuple(int(s) for s in n.meta["val"].shape))
        for n in program.placeholders("weight")
    )
    values = weights_of(tuple(sorted(key)))
    args = []
    for node in program.placeholders():
        spec = program.inputs[node.name]
        if spec.role == "weight":
            args.append(values[spec.source])
        elif spec.role == "constant":
            args.append(program.constants[spec.source])
        elif spec.source == "input_ids":
            args.append(torch.tensor([ids]))
        elif spec.source == "position_ids":
            args.append(torch.arange(len(ids))[None])
        else:
            args.append(inputs[spec.source])
    logits, *_ = torch.fx.Interpreter(program.module).run(*args)
    return logits


def configured(item: GraphPass, **options: Any) -> GraphPass:
    """A pass with options, as the column would hold it."""
    return replace(item, options=options)
