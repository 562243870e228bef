"""Building without weights: parameters on meta, buffers as from_pretrained has them."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTConfig

from fxlm.compiler.errors import InvalidModel, UnsupportedModel
from fxlm.models.build import build_model
from fxlm.models.checkpoint import open_checkpoint
from fxlm.models.tiny import tiny_config
from tests.checkpoints import FAMILIES, make_checkpoint

ROPES = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "longrope": {
        "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", [*FAMILIES, "gptj", "bloom"])
def test_parameters_on_meta_buffers_real(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = make_checkpoint(family, tmp_path)
    model = build_model(open_checkpoint(path), torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    assert not model.training
    expected = {name: p.dtype for name, p in theirs.named_parameters()}
    assert {name: p.dtype for name, p in model.named_parameters()} == expected
    for parameter in model.parameters():
        assert parameter.device.type == "meta"
        assert not parameter.requires_grad
    buffers = dict(model.named_buffers())
    assert set(buffers) == {name for name, _ in theirs.named_buffers()}
    for name, value in theirs.named_buffers():
        assert torch.equal(buffers[name], value), name


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_frequencies_of_every_type(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    rope = {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}
    path = make_checkpoint("llama", tmp_path, rope_parameters=rope)
    model = build_model(open_checkpoint(path), torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(path)
    name = "model.rotary_emb.inv_freq"
    assert torch.equal(model.get_buffer(name), theirs.get_buffer(name))


def test_nothing_of_weight_size_is_resident() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = tiny_config("llama", hidden_size=8192, intermediate_size=28672, vocab_size=128256)
    model = build_model(config, torch.bfloat16)
    assert sum(p.nbytes for p in model.parameters()) > 5 << 30
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 256 << 10, f"{grown} KiB"


def test_config_is_not_changed() -> None:
    config = tiny_config("llama")
    before = config.to_dict()
    build_model(config, torch.float32)
    assert config.to_dict() == before


def test_quantization_is_no_part_of_the_model() -> None:
    config = tiny_config("llama")
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    model: Any = build_model(config, torch.float32)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert not hasattr(model.config, "quantization_config")


def test_what_cannot_be_built(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path)
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text.replace('"llama"', '"no_such_type"'))
    with pytest.raises(InvalidModel, match="no_such_type"):
        build_model(open_checkpoint(path), torch.float32)
    with pytest.raises(UnsupportedModel, match="vit"):
        build_model(ViTConfig(), torch.float32)
