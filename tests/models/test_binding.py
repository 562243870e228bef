"""Raw tensors to parameters: the same values that from_pretrained puts into the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fxlm.compiler.errors import InvalidModel
from fxlm.models.binding import Binding, bind
from fxlm.models.build import build_model
from fxlm.models.checkpoint import Checkpoint, open_checkpoint
from tests.checkpoints import FAMILIES, make_checkpoint

MORE = ["deepseek_v3", "glm4_moe", "gpt_oss", "bloom", "dbrx", "qwen2_moe"]


def bound(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Checkpoint, Any, Binding]:
    checkpoint = open_checkpoint(path)
    model = build_model(checkpoint, dtype)
    return checkpoint, model, bind(checkpoint, model)


def converted(checkpoint: Checkpoint, binding: Binding) -> dict[str, torch.Tensor]:
    return binding.convert({name: checkpoint.read(name) for name in binding.names})


def reference(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_from_pretrained(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = make_checkpoint(family, tmp_path)
    checkpoint, model, binding = bound(path, dtype)
    ours, theirs = converted(checkpoint, binding), reference(path, dtype)
    assert set(theirs) <= set(ours) | set(binding.constants)
    for name, value in theirs.items():
        if name not in binding.constants:
            assert ours[name].dtype == value.dtype, name
            assert torch.equal(ours[name], value), name
    assert binding.unused == []
    parameters = {name for name, _ in model.named_parameters()}
    assert parameters <= set(ours)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_traces_under_fake_tensors(family: str, tmp_path: Path) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    checkpoint, _, binding = bound(make_checkpoint(family, tmp_path), torch.bfloat16)
    raw = {name: checkpoint.read(name) for name in binding.names}
    graph = make_fx(lambda values: binding.convert(values), tracing_mode="fake")(raw)
    traced, direct = graph(raw), binding.convert(raw)
    assert all(torch.equal(traced[name], direct[name]) for name in direct)


def rewrite(path: Path, edit: Any) -> None:
    values = load_file(path / "model.safetensors")
    edit(values)
    save_file(values, path / "model.safetensors", metadata={"format": "pt"})


def test_missing_tensors_are_named_and_counted(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path)

    def drop(values: dict[str, torch.Tensor]) -> None:
        for name in [n for n in values if "q_proj" in n]:
            del values[name]

    rewrite(path, drop)
    with pytest.raises(InvalidModel, match=r"lacks 2 of .*q_proj"):
        bound(path)


def test_wrong_shape_names_both(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(path, lambda values: values.update({name: values[name][:5].clone()}))
    with pytest.raises(InvalidModel, match=r"up_proj.*\[5, 64\].*\[96, 64\]"):
        bound(path)


def test_missing_expert_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint("mixtral", tmp_path)
    rewrite(path, lambda values: values.pop(next(n for n in values if ".experts.3." in n)))
    with pytest.raises(InvalidModel, match="experts"):
        bound(path)


def test_unused_tensors_are_reported(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path)
    rewrite(path, lambda values: values.update({"stray.weight": torch.ones(3)}))
    checkpoint, _, binding = bound(path)
    assert binding.unused == ["stray.weight"]
    assert "stray.weight" not in binding.names
    assert "lm_head.weight" in converted(checkpoint, binding)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_layers_beyond_those_of_the_config_are_refused(family: str, tmp_path: Path) -> None:
    path = make_checkpoint(family, tmp_path)
    config = json.loads((path / "config.json").read_text())
    field = next(name for name in ("num_hidden_layers", "n_layer") if name in config)
    (path / "config.json").write_text(json.dumps({**config, field: 1}))
    with pytest.raises(InvalidModel, match=rf"{field}=1, .* first '[\w.]+\.1\.[\w.]+': .*Correct"):
        bound(path)


@pytest.mark.parametrize("field", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_layers_that_predict_further_tokens_are_lawful(
    field: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_checkpoint("llama", tmp_path, **{field: 1})
    extra = {f"model.layers.{n}.eh_proj.weight": torch.ones(3) for n in (2, 3)}
    rewrite(path, lambda values: values.update({UP.replace(".1.", ".2."): values[UP].clone()}))
    with pytest.raises(InvalidModel, match=r"first 'model\.layers\.2\.mlp"):  # a plain layer
        bound(path)
    third = extra.pop("model.layers.3.eh_proj.weight")
    rewrite(path, lambda values: values.update(extra))
    bound(path)
    assert caplog.messages == []
    rewrite(path, lambda values: values.update({"model.layers.3.eh_proj.weight": third}))
    with pytest.raises(InvalidModel, match=r"first 'model\.layers\.3\.eh_proj"):
        bound(path)


def test_tensors_that_no_parameter_needs_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_checkpoint("llama3", tmp_path)
    lawful = {"model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.k_scale",
              "model.layers.0.mlp.up_proj.weight_shape"}  # fmt: skip
    stray = "vision_tower.encoder.layers.7.fc1.weight"

    def add(values: dict[str, torch.Tensor]) -> None:
        values["lm_head.weight"] = values["model.embed_tokens.weight"].clone()
        values.update({name: torch.ones(3) for name in (*lawful, stray)})

    rewrite(path, add)
    bound(path)
    (said,) = caplog.messages
    assert said.startswith("1 of the ")
    assert said.endswith(f"are not used by LlamaForCausalLM: {stray}")


def test_base_model_prefix_may_be_absent(tmp_path: Path) -> None:
    path = make_checkpoint("gpt2", tmp_path)
    before = reference(path)

    def strip(values: dict[str, torch.Tensor]) -> None:
        for name in list(values):
            values[name.removeprefix("transformer.")] = values.pop(name)

    rewrite(path, strip)
    ours = converted(*bound(path)[::2])
    assert all(torch.equal(ours[name], value) for name, value in before.items())


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    checkpoint, model, binding = bound(make_checkpoint("llama3", tmp_path))
    ours = converted(checkpoint, binding)
    assert binding.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert ours["lm_head.weight"] is ours["model.embed_tokens.weight"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("equal", [True, False])
def test_both_of_a_tied_pair_on_disk(tmp_path: Path, equal: bool) -> None:
    path = make_checkpoint("llama3", tmp_path)

    def add(values: dict[str, torch.Tensor]) -> None:
        head = values["model.embed_tokens.weight"].clone()
        values["lm_head.weight"] = head if equal else head + 1

    rewrite(path, add)
    checkpoint, model, binding = bound(path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == equal
    assert ("lm_head.weight" in binding.tied) == equal
    ours = converted(checkpoint, binding)
    same = torch.equal(ours["lm_head.weight"], ours["model.embed_tokens.weight"])
    assert same == equal


def test_persistent_buffers_on_disk_become_weights(tmp_path: Path) -> None:
    _, model, binding = bound(make_checkpoint("deepseek_v3", tmp_path))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert name in binding.targets
    assert name in dict(model.named_parameters())
    assert name not in dict(model.named_buffers())


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_codes_without_a_quantization_config_are_refused(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    path = make_checkpoint("llama", tmp_path)
    rewrite(path, lambda values: values.update({UP: values[UP].to(dtype)}))
    with pytest.raises(InvalidModel, match=r"up_proj\.weight.* has no quantization_config"):
        bound(path)


def test_codes_that_the_format_does_not_cover_are_refused(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path, quantization_config={"quant_method": "fp8"})
    rewrite(path, lambda values: values.update({UP: values[UP].to(torch.float8_e5m2)}))
    with pytest.raises(InvalidModel, match=r"is float8_e5m2.*\(fp8\) does not cover"):
        bound(path)


@pytest.mark.parametrize("beside", ["weight_scale", "weight_scale_inv", "qzeros", "weight.absmax"])
def test_scales_beside_a_plain_weight_are_refused(beside: str, tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path)
    scale = UP.replace("weight", beside)
    rewrite(path, lambda values: values.update({scale: torch.ones(3)}))
    with pytest.raises(InvalidModel, match=rf"up_proj\.weight' .* is F32.*up_proj\.{beside}'"):
        bound(path)
