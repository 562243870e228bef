"""fxlm quantize: what it writes is what it measured, and what others read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fxlm.compiler.errors import InvalidModel, InvalidOption
from fxlm.compiler.options import CompileOptions
from fxlm.models.binding import bind
from fxlm.models.build import build_model
from fxlm.models.checkpoint import open_checkpoint
from fxlm.models.formats import write_compressed
from fxlm.runtime.compile import compile_model
from fxlm.runtime.quantize import describe, quantize_checkpoint
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    return make_checkpoint("llama", path, tokenizer=True, dtype="bfloat16")


def weights(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path)
    binding = bind(checkpoint, build_model(checkpoint, torch.float32))
    return binding.convert({name: checkpoint.read(name) for name in binding.names})


SCHEMES = ["int8", "int8wo", "int4-g32", "int4a8-g32", "fp8", "fp8-channel", "fp8-block",
           "int8,down_proj=int4-g32,layers.1.self_attn=none"]  # fmt: skip


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # to ask for dense weights
@pytest.mark.parametrize("scheme", SCHEMES[:-1])
def test_transformers_reads_what_we_write(scheme: str, dense: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    out = tmp_path / "out"
    quantize_checkpoint(str(dense), scheme, out)
    settings = CompressedTensorsConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(out, quantization_config=settings)
    require_close(model, out)


def test_transformers_reads_several_schemes(dense: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    quantize_checkpoint(str(dense), "int8,down_proj=int8wo,layers.1.self_attn=none", out)
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    model.hf_quantizer.compressor.decompress_model(model)
    require_close(model, out)


def require_close(model: Any, path: Path) -> None:
    """Transformers' arithmetic is that of the scales' type, bfloat16."""
    state = model.state_dict()
    for name, value in weights(path).items():
        torch.testing.assert_close(state[name].float(), value, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_errors_are_those_of_the_file(scheme: str, dense: Path, tmp_path: Path) -> None:
    done = quantize_checkpoint(str(dense), scheme, tmp_path / "out")
    before, after = weights(dense), weights(tmp_path / "out")
    assert sum(layer.scheme is not None for layer in done.layers) >= 10
    for layer in done.layers:
        old, new = before[f"{layer.path}.weight"], after[f"{layer.path}.weight"]
        if layer.scheme is None:
            assert torch.equal(old, new), layer
        else:
            found = float((new - old).norm() / old.norm())
            assert layer.weight_error == pytest.approx(found, rel=1e-3)
            assert 0 < found < 0.2
    assert done.bytes_after < done.bytes_before
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_the_copy_is_whole(dense: Path, tmp_path: Path) -> None:
    quantize_checkpoint(str(dense), "int8", tmp_path / "out")
    names = {p.name for p in dense.iterdir()}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]


def test_calibration_measures_outputs(dense: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 5)
    eight = quantize_checkpoint(str(dense), "int8", tmp_path / "a8", calibration=text)
    only = quantize_checkpoint(str(dense), "int8wo", tmp_path / "wo", calibration=text)
    assert eight.num_tokens == only.num_tokens > 20
    for rounded, plain in zip(eight.layers, only.layers, strict=True):
        if plain.scheme is not None:
            assert rounded.weight_error == plain.weight_error
            assert plain.output_error is not None
            assert rounded.output_error is not None
            assert 0 < plain.output_error < rounded.output_error < 0.05


def test_a_budget_leaves_the_worst_layers_alone(dense: Path, tmp_path: Path) -> None:
    free = quantize_checkpoint(str(dense), "int4-g32", tmp_path / "free")
    errors = sorted(layer.error for layer in free.layers if layer.scheme)
    budget = (errors[6] + errors[7]) / 2
    bound = quantize_checkpoint(str(dense), "int4-g32", tmp_path / "bound", budget_error=budget)
    assert [layer.error <= budget for layer in free.layers if layer.scheme] == [
        layer.scheme is not None for layer in bound.layers if layer.weight_error
    ]
    assert sum(layer.scheme is not None for layer in bound.layers) == 7
    assert "more than" in "\n".join(bound.lines())


def test_large_checkpoints_are_sharded(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_checkpoint(str(dense), "int8", tmp_path / "one")
    monkeypatch.setattr(write_compressed, "SHARD_BYTES", 40_000)
    quantize_checkpoint(str(dense), "int8", tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert all(torch.equal(value, many[name]) for name, value in one.items())


def test_a_tied_head_stays(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path / "tied", tie_word_embeddings=True)
    done = quantize_checkpoint(str(path), "int8,head=int8", tmp_path / "out")
    (head,) = [layer for layer in done.layers if layer.path == "lm_head"]
    assert head.scheme is None
    assert "serves elsewhere" in head.reason


def test_weights_in_another_form_stay(tmp_path: Path) -> None:
    path = make_checkpoint("mixtral", tmp_path / "moe")
    done = quantize_checkpoint(str(path), "int8", tmp_path / "out")
    kept = {layer.path.rpartition(".")[2] for layer in done.layers if layer.scheme is None}
    assert kept == {"gate", "lm_head"}
    before, after = weights(path), weights(tmp_path / "out")
    assert {n for n in before if not torch.equal(before[n], after[n])} == {
        f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "qkvo"
    }


def test_what_cannot_be_done_is_said(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="did you mean 'int8'"):
        quantize_checkpoint(str(dense), "int9", tmp_path / "out")
    with pytest.raises(InvalidOption, match="--output"):
        quantize_checkpoint(str(dense), "int8", dense)
    for budget in (-1.0, math.nan, math.inf):
        with pytest.raises(InvalidOption, match=f"--budget-error={budget}"):
            quantize_checkpoint(str(dense), "int8", tmp_path / "out", budget_error=budget)
    with pytest.raises(InvalidOption, match="no layer's error is that small"):
        quantize_checkpoint(str(dense), "int8", tmp_path / "out", budget_error=1e-9)
    with pytest.raises(InvalidOption, match="--calibration"):
        quantize_checkpoint(str(dense), "int8", tmp_path / "out", calibration=tmp_path / "no")
    quantize_checkpoint(str(dense), "int8", tmp_path / "out")
    with pytest.raises(InvalidModel, match="quantized already"):
        quantize_checkpoint(str(tmp_path / "out"), "int8", tmp_path / "again")


def test_the_plan_says_how_weights_are_quantized(dense: Path, tmp_path: Path) -> None:
    def said(path: Path, option: str | None) -> tuple[str, str]:
        options = CompileOptions(eager=True, quantization=option)
        checkpoint = open_checkpoint(path)
        made = compile_model(checkpoint, options, cache_dir=tmp_path / "cache")
        return describe(option, checkpoint, made.artifact)

    assert said(dense, None) == ("none", "the checkpoint is dense")
    assert said(dense, "int8") == ("int8", "8 weights are read as they are")
    quantize_checkpoint(str(dense), "fp8", tmp_path / "fp8")
    fp8 = ("compressed-tensors", "8 weights are read as they are")
    assert said(tmp_path / "fp8", None) == fp8
    both = said(tmp_path / "fp8", "int8,head=int8")
    assert both == ("compressed-tensors + int8,head=int8", "9 weights are read as they are")
    moe = make_checkpoint("mixtral", tmp_path / "moe")
    assert said(moe, "int8") == ("int8", "4 weights are read as they are")


def test_an_output_that_cannot_be_made_is_named(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidOption, match=r"--output='.*file/y'.* it cannot be made"):
        quantize_checkpoint(str(dense), "int8", tmp_path / "file" / "y")
