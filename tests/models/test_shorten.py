"""shorten: the first layers of a checkpoint as a checkpoint of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxlm.compiler.errors import InvalidOption
from fxlm.compiler.options import CompileOptions
from fxlm.models.checkpoint import open_checkpoint
from fxlm.models.shorten import num_layers, shorten
from fxlm.models.tiny import write_checkpoint
from fxlm.runtime.front import front


def test_it_captures_with_fewer_layers(tmp_path: Path) -> None:
    whole = open_checkpoint(write_checkpoint("gemma2", tmp_path / "whole", num_hidden_layers=4))
    (tmp_path / "short").mkdir()
    short = shorten(whole, 3, tmp_path / "short")
    assert (num_layers(whole.config), num_layers(short.config)) == (4, 3)
    assert len(short.config["layer_types"]) == 3
    program = front(short, CompileOptions(dtype="float32")).program
    assert len(program.find(torch.ops.fxlm.attention.default)) == 3


@pytest.mark.parametrize("count", [0, 3])
def test_layers_that_are_not_there_are_refused(count: int, tmp_path: Path) -> None:
    whole = open_checkpoint(write_checkpoint("llama", tmp_path / "whole"))
    with pytest.raises(InvalidOption, match="the model has 2 layers"):
        shorten(whole, count, tmp_path)
