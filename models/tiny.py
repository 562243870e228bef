"""Tiny random checkpoints of any model type that transformers registers.

For tests and for the coverage table: real config classes shrunk by a table of field names,
with what single types need beside it as data (`fxlm.models.tiny_overrides`). Weights are
random, seeded and wide enough that greedy tokens vary. Not here: any real model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fxlm.models.tiny_overrides import OVERRIDES

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_GENERIC: dict[tuple[str, ...], Any] = {
    _LAYERS: 2,
    ("hidden_size", "n_embd", "d_model", "dim", "n_embed", "embedding_size"): 64,
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"): 4,
    ("decoder_attention_heads",): 4,
    ("num_key_value_heads", "num_kv_heads"): 2,
    ("head_dim", "v_head_dim", "swa_head_dim", "kv_channels", "attention_head_dim"): 16,
    ("global_head_dim", "linear_key_head_dim", "linear_value_head_dim"): 16,
    ("qk_head_dim",): 16,
    ("qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"): 8,
    ("kv_lora_rank", "q_lora_rank"): 24,
    ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "mlp_dim"): 96,
    ("ffn_hidden_size", "shared_intermediate_size", "block_ff_dim"): 96,
    ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"): 32,
    ("vocab_size",): 256,
    ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length"): 512,
    ("max_sequence_length",): 512,
    ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"): 4,
    ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts"): 2,
    ("n_group", "topk_group", "n_shared_experts", "num_expert_group"): 1,
    ("first_k_dense_replace", "num_dense_layers"): 1,
    ("sliding_window", "attention_chunk_size", "window_size"): 8,
    ("mamba_n_heads", "mamba_num_heads", "linear_num_key_heads", "linear_num_value_heads"): 4,
    ("mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size", "state_size"): 16,
}  # fmt: skip
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def model_types() -> list[str]:
    """Every model type with a causal LM in transformers, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """A config object of ``model_type``: about 2 layers of width 64 over 256 tokens.

    Args:
        model_type: transformers' name, e.g. ``llama``.
        overrides: fields of the (text) config; they win over every table.
    """
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    wanted = {**OVERRIDES.get(model_type, {}), **overrides}
    return cls(**_shrunk(cls, cls(), wanted))


def _shrunk(cls: Any, default: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    fields = default.to_dict()
    aliases = dict(getattr(cls, "attribute_map", None) or {})
    result: dict[str, Any] = {}
    for names, value in _GENERIC.items():
        for name in names:
            if type(fields.get(name)) is int:
                result[name] = copy.deepcopy(value)
    for name, value in _TOKENS.items():
        if name in fields:
            result[name] = value
    for name in ("forced_eos_token_id", "forced_bos_token_id"):  # generate() would obey them
        if name in fields:
            result[name] = None
    if type(fields.get("qk_rope_head_dim")) is int and "head_dim" in result:
        result["head_dim"] = result["qk_rope_head_dim"]  # MLA: head_dim is that of the rotation
    if type(fields.get("kv_lora_rank")) is int and "num_key_value_heads" in result:
        result["num_key_value_heads"] = 4  # MLA: every head has keys of its own
    result.update(_shrunk_nests(cls, default, overrides))
    result.update(overrides)
    result.update(_shrunk_lists(fields, result))
    return {aliases.get(name, name): value for name, value in result.items()}


def _shrunk_nests(cls: Any, default: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    result = {}
    for name in getattr(cls, "sub_configs", None) or {}:
        inner = getattr(default, name, None)
        if inner is not None and hasattr(inner, "to_dict"):
            result[name] = _shrunk(type(inner), inner, {})
    return result


def _shrunk_lists(fields: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Cut per-layer lists to the number of layers, every kind of layer kept if there is room."""
    before = next((fields[name] for name in _LAYERS if type(fields.get(name)) is int), 0)
    after = next((result[name] for name in _LAYERS if name in result), before)
    lists: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == before and name not in result and before:
            kinds = list(dict.fromkeys(map(str, value)))
            first = [next(v for v in value if str(v) == kind) for kind in kinds]
            lists[name] = (first + value)[:after] if after >= len(first) else first[:after]
    return lists


def randomize(model: torch.nn.Module, seed: int = 0, gain: float = 1.5) -> None:
    """Fill the parameters with seeded noise, so that every layer matters to the tokens.

    Matrices get gain / sqrt(fan in), embeddings unit variance, vectors a tenth around what
    they were.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.dim() < 2:
                parameter.add_(0.1 * noise)
            elif "emb" in name or name.endswith(("wte.weight", "wpe.weight")):
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * gain / parameter.shape[-1] ** 0.5)


def write_checkpoint(
    model_type: str, path: Path | str, *, seed: int = 0, dtype: str = "float32", **overrides: Any
) -> Path:
    """Write a tiny random checkpoint with ``save_pretrained``.

    Returns:
        ``path``, holding config.json, model.safetensors and generation_config.json.
    """
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type, **overrides)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()
    randomize(model, seed)
    model.to(getattr(torch, dtype))
    config.dtype = dtype
    model.save_pretrained(path)
    return Path(path)
