"""compressed-tensors checkpoints: what the format's own library wrote, and what it would read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fxlm.compiler.errors import InvalidModel
from fxlm.models.binding import bind
from fxlm.models.build import build_model
from fxlm.models.checkpoint import open_checkpoint
from fxlm.models.formats import logical_tensors
from tests.checkpoints import make_checkpoint

pytest.importorskip("compressed_tensors")

INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
FP8_TOKEN = {**TOKEN, "type": "float"}
# name -> (format, weights, input activations)
SCHEMES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "int8": ("int-quantized", INT8, TOKEN),
    "int8 asymmetric": ("int-quantized", {**INT8, "symmetric": False}, TOKEN),
    "int8 per tensor": ("int-quantized", {**INT8, "strategy": "tensor"}, TOKEN),
    "int8 in groups": ("naive-quantized", {**INT8, "strategy": "group", "group_size": 16}, None),
    "int8 packed": ("pack-quantized", INT8, None),
    "int4": ("pack-quantized", {**INT4, "symmetric": True}, None),
    "int4 asymmetric": ("pack-quantized", {**INT4, "symmetric": False}, None),
    "int4 per channel": ("pack-quantized", {**INT8, "num_bits": 4, "symmetric": False}, None),
    "int2": ("pack-quantized", {**INT4, "num_bits": 2, "symmetric": False}, None),
    "fp8": ("float-quantized", {**FP8, "strategy": "tensor"}, FP8_TOKEN),
    "fp8 per channel": ("float-quantized", {**FP8, "strategy": "channel"}, FP8_TOKEN),
    "fp8 in blocks": (
        "float-quantized",
        {**FP8, "strategy": "block", "block_structure": [16, 32]},
        FP8_TOKEN,
    ),
}


def write(
    path: Path, scheme: str, family: str = "llama", targets: Any = ("Linear",), **changes: Any
) -> dict[str, torch.Tensor]:
    """Write a checkpoint with the library; returns what the library decompresses it to."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    form, weights, inputs = SCHEMES[scheme]
    make_checkpoint(family, path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    group = {"targets": list(targets), "weights": weights, "input_activations": inputs}
    settings = {"config_groups": {"group_0": group}, "format": form, "ignore": ["lm_head"]}
    config = QuantizationConfig.model_validate({**settings, **changes})
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            least, most = _extremes(module.weight, weights)
            scale, zero = calculate_qparams(least, most, module.quantization_scheme.weights)
            module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=form)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(str(path))
    compressor.decompress_model(model)
    return {n: p.detach().clone() for n, p in model.state_dict().items() if n.endswith(".weight")}


def _extremes(weight: torch.Tensor, args: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = {
        "tensor": weight.shape, "channel": (1, weight.shape[1]),
        "group": (1, args.get("group_size", 0)), "block": args.get("block_structure", (0, 0)),
    }[args["strategy"]]  # fmt: skip
    blocks = weight.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    return blocks.amin((1, 3)), blocks.amax((1, 3))


def ours(path: Path) -> dict[str, torch.Tensor]:
    """Every parameter of the model, as we read it."""
    checkpoint = open_checkpoint(path)
    binding = bind(checkpoint, build_model(checkpoint, torch.float32))
    return binding.convert({name: checkpoint.read(name) for name in binding.names})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_what_the_library_decompresses(scheme: str, tmp_path: Path) -> None:
    expected = write(tmp_path, scheme)
    found = ours(tmp_path)
    quantized = [n for n in expected if "proj" in n]
    assert len(quantized) == 14
    for name in quantized:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    raw = load_file(tmp_path / "model.safetensors")
    assert not [n for n in quantized if n in raw and raw[n].is_floating_point() and "8" not in
                str(raw[n].dtype)]  # fmt: skip


def test_the_head_that_is_ignored_stays_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, "int8")
    logical = logical_tensors(open_checkpoint(tmp_path))
    assert logical["lm_head.weight"].sources == ("lm_head.weight",)
    sources = logical["model.layers.0.mlp.up_proj.weight"].sources
    assert sources == tuple(f"model.layers.0.mlp.up_proj.weight{s}" for s in ("", "_scale"))


def test_inputs_out_of_order_of_their_groups(tmp_path: Path) -> None:
    write(tmp_path, "int4")
    path = tmp_path / "model.safetensors"
    raw = load_file(path)
    name = "model.layers.0.mlp.up_proj"
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    groups = (torch.arange(64) // 32)[order].int()
    raw[f"{name}.weight_g_idx"] = groups
    save_file(raw, path, {"format": "pt"})
    found = ours(tmp_path)[f"{name}.weight"]
    packed = raw[f"{name}.weight_packed"]
    codes = torch.stack([(packed >> s & 15) - 8 for s in range(0, 32, 4)], -1).flatten(1)
    expected = codes * raw[f"{name}.weight_scale"][:, groups.long()]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_group_is_found_by_name_before_pattern_before_class(tmp_path: Path) -> None:
    write(tmp_path, "int4")
    config = json.loads((tmp_path / "config.json").read_text())
    settings = config["quantization_config"]
    right = settings["config_groups"].pop("group_0")
    wrong = {**right, "weights": {**right["weights"], "num_bits": 8}}
    settings["config_groups"] = {
        "by_class": {**wrong, "targets": ["Linear"]},
        "by_pattern": {**right, "targets": ["re:.*proj"]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ours(tmp_path)
    settings["config_groups"]["by_name"] = {
        **wrong,
        "targets": ["model.layers.1.self_attn.q_proj"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidModel, match=r"layers\.1\.self_attn\.q_proj.*by_name"):
        ours(tmp_path)


def test_the_name_of_another_module_is_no_class(tmp_path: Path) -> None:
    write(tmp_path, "int8")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    groups = config["quantization_config"]["config_groups"]
    right = groups.pop("group_0")
    wrong = {**right, "weights": {**right["weights"], "strategy": "group", "group_size": 16}}
    groups |= {"head": {**wrong, "targets": ["lm_head", "Embedding"]}, "others": right}
    path.write_text(json.dumps(config))
    assert ours(tmp_path)


def test_zero_points_of_zero_are_symmetric(written: Path, tmp_path: Path) -> None:
    def add(raw: dict[str, torch.Tensor], _: Any) -> None:
        raw[f"{LAYER}.weight_zero_point"] = torch.zeros(96, 1, dtype=torch.int8)

    assert ours(edited(written, tmp_path, add))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8")
    write(path, "int8")
    return path


def edited(written: Path, path: Path, edit: Any) -> Path:
    """A copy whose tensors and settings ``edit`` has changed."""
    shutil.copytree(written, path, dirs_exist_ok=True)
    raw = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    edit(raw, config["quantization_config"])
    save_file(raw, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


LAYER = "model.layers.0.mlp.up_proj"
WRONGS: dict[str, tuple[Any, str]] = {
    "no scale": (lambda raw, _: raw.pop(f"{LAYER}.weight_scale"), "lacks tensor .*up_proj"),
    "scale of another layer": (
        lambda raw, _: raw.update({f"{LAYER}.weight_scale": torch.ones(7, 1)}),
        r"up_proj.weight_scale.*\[7, 1\], must be \[96, 1\]",
    ),
    "another type": (
        lambda raw, _: raw.update({f"{LAYER}.weight": torch.ones(96, 64).to(torch.float8_e4m3fn)}),
        "up_proj.weight.* is F8_E4M3, must be I8",
    ),
    "no group": (lambda _, c: c.update(config_groups={}), "no config_groups target fits"),
    "unread format": (lambda _, c: c.update(format="nvfp4-pack-quantized"), "'nvfp4-pack-quant"),
    "sparse": (lambda _, c: c.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparse"),
    "sparsity in a word": (lambda _, c: c.update(sparsity_config="2:4"), "is '2:4', must be an"),
    "transforms": (
        lambda _, c: c.update(transform_config={"config_groups": {"u": {}}}),
        "transforms",
    ),
    "unknown method": (lambda _, c: c.update(quant_method="magic"), "'magic', which is not read"),
    "no method": (lambda _, c: c.update(quant_method=3), "names no quant_method"),
    "strategy": (
        lambda _, c: c["config_groups"]["group_0"]["weights"].update(strategy="attn_head"),
        "by 'attn_head'",
    ),
    "zero points of symmetric weights": (
        lambda raw, _: raw.update({f"{LAYER}.weight_zero_point": torch.ones(96, 1).to(torch.int8)}),
        "says symmetric: true, but .*up_proj.weight_zero_point",
    ),
    "inputs of 4 bits": (
        lambda _, c: c["config_groups"]["group_0"]["input_activations"].update(num_bits=4),
        "'group_0': input_activations of 4 bits, 'int'",
    ),
    "inputs in groups": (
        lambda _, c: c["config_groups"]["group_0"]["input_activations"].update(strategy="group"),
        "input_activations of 8 bits, 'int' by 'group'",
    ),
    "bits in words": (
        lambda _, c: c["config_groups"]["group_0"]["weights"].update(num_bits="eight"),
        "'group_0': .*'eight'",
    ),
    "groups in a list": (lambda _, c: c.update(config_groups=[1]), r"config_groups is \[1\]"),
    "a pattern that is none": (
        lambda _, c: c["config_groups"]["group_0"].update(targets=["re:("]),
        r"target 're:\(' is no regular expression",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONGS)
def test_what_is_wrong_is_said(wrong: str, written: Path, tmp_path: Path) -> None:
    edit, reason = WRONGS[wrong]
    path = edited(written, tmp_path, edit)
    with pytest.raises(InvalidModel, match=reason):
        logical_tensors(open_checkpoint(path))


def test_a_packed_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "int4")

    def cut(raw: dict[str, torch.Tensor], _: Any) -> None:
        raw[f"{LAYER}.weight_packed"] = raw[f"{LAYER}.weight_packed"][:, :5].contiguous()

    path = edited(tmp_path, tmp_path / "cut", cut)
    with pytest.raises(InvalidModel, match=r"weight_packed.*\[96, 5\], must be \[96, 8\]"):
        logical_tensors(open_checkpoint(path))
