"""A checkpoint of given tensors, read by its format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fxlm.models.checkpoint import open_checkpoint
from fxlm.models.formats import logical_tensors

GOLDEN = Path(__file__).resolve().parent / "data"


def write(path: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    """A directory with these tensors and this ``quantization_config``."""
    config = {"model_type": "llama", "quantization_config": settings}
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def read(path: Path, name: str) -> torch.Tensor:
    """One dense tensor, computed eagerly; its stated shape is asserted."""
    checkpoint = open_checkpoint(path)
    logical = logical_tensors(checkpoint)[name]
    made = logical.build(*(checkpoint.read(source) for source in logical.sources))
    assert tuple(made.shape) == logical.shape
    return made


def golden(file: str, case: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors of a layer ``m`` as the format's own library packed them, and what it unpacks."""
    every = load_file(GOLDEN / file)
    mine = {n.removeprefix(f"{case}."): t for n, t in every.items() if n.startswith(f"{case}.")}
    expected = mine.pop("expected")
    return {f"m.{name}": tensor for name, tensor in mine.items()}, expected
