"""Architectures of GGUF files: keys of the config, names of tensors, and what a converter changed.

Source: llama.cpp's ``convert_hf_to_gguf.py`` and gguf-py's ``constants.py``. An architecture is one
entry of `ARCHITECTURES`; one that is missing is refused by name. Not here: blocks
(`fxlm.models.formats.gguf`), the file (`fxlm.models.gguf_file`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fxlm.compiler.errors import InvalidModel
from fxlm.models.gguf_values import require_kinds
from fxlm.models.shorten import STORED

if TYPE_CHECKING:
    import torch

    from fxlm.models.checkpoint import Checkpoint

# Key of the file, below the architecture's name -> field of config.json.
COMMON = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
}  # fmt: skip
# Stem of a tensor -> module; {i} is the layer.
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{e}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{e}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{e}.w2",
}
QWEN_EXPERTS = {
    "ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
    "ffn_up_exps": "mlp.experts.{e}.up_proj", "ffn_down_exps": "mlp.experts.{e}.down_proj",
}  # fmt: skip
GEMMA = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
PHI3 = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
# Tensors that are read for the config, or not at all.
SET_ASIDE = ("rope_freqs", "rope_factors_long", "rope_factors_short")


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What is particular about one ``general.architecture``.

    Attributes:
        model_type: of transformers.
        fields: fields of config.json that the file does not hold.
        keys: more keys, as `COMMON`.
        layer: more names, as `LAYER`.
        interleaved: rows of q and k come in rotary pairs (2i, 2i + 1); transformers has halves.
        norms_plus_one: a converter added 1 to the weights of norms.
    """

    model_type: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    layer: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    norms_plus_one: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(model_type="llama", interleaved=True),
    "mixtral": Architecture(  # the file says llama, and how many experts there are
        model_type="mixtral", interleaved=True, layer=MIXTRAL,
        keys={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    ),
    "qwen2": Architecture(model_type="qwen2"),
    "qwen3": Architecture(model_type="qwen3"),
    "qwen3moe": Architecture(
        model_type="qwen3_moe", layer=QWEN_EXPERTS, fields={"norm_topk_prob": True},
        keys={
            "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
    ),
    "gemma2": Architecture(
        model_type="gemma2", layer=GEMMA, norms_plus_one=True,
        fields={"hidden_activation": "gelu_pytorch_tanh"},
        keys={
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
    ),
    "phi3": Architecture(model_type="phi3", layer=PHI3),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a tensor, or an expert of it, goes.

    Attributes:
        name: in the Hugging Face checkpoint.
        shape: of the values there.
        expert: index into the first size; -1: there are none.
        heads: rows are so many heads of rotary pairs; 0: leave them.
        minus_one: subtract 1.
    """

    name: str
    shape: tuple[int, ...]
    expert: int = -1
    heads: int = 0
    minus_one: bool = False

    def rows(self, raw: torch.Tensor) -> torch.Tensor:
        """Rows of the raw tensor, in the order of the model."""
        own = raw[self.expert] if self.expert >= 0 else raw
        if not self.heads:
            return own
        pairs: torch.Tensor = own.unflatten(0, (self.heads, -1, 2))
        return pairs.transpose(1, 2).reshape(own.shape)

    def values(self, dense: torch.Tensor) -> torch.Tensor:
        """The values, with what the converter did undone."""
        return dense - 1 if self.minus_one else dense


def architecture(values: Mapping[str, Any], where: object) -> tuple[str, Architecture]:
    """The prefix of the file's keys, and its architecture.

    Raises:
        InvalidModel: it is not known.
    """
    prefix = str(values.get("general.architecture"))
    name = "mixtral" if prefix == "llama" and values.get("llama.expert_count") else prefix
    if name not in ARCHITECTURES:
        raise InvalidModel(
            f"{where} is of architecture {prefix!r}, which is not read from GGUF; read are "
            f"{', '.join(sorted(ARCHITECTURES))}. Use the safetensors checkpoint"
        )
    return prefix, ARCHITECTURES[name]


def config_of(values: Mapping[str, Any], names: Mapping[str, Any], where: object) -> dict[str, Any]:
    """config.json of a file.

    Args:
        values: of the header.
        names: tensors by name; of the rotary factors, as lists.
        where: the file, for errors.
    """
    prefix, kind = architecture(values, where)
    config: dict[str, Any] = {"model_type": kind.model_type, **kind.fields}
    if isinstance(values.get(f"{prefix}.attention.head_count_kv"), list):
        raise InvalidModel(f"{where} has another number of KV heads in each layer")
    keys = {**COMMON, **kind.keys}
    require_kinds(values, prefix, keys, where)
    for key, name in keys.items():
        value = values.get(f"{prefix}.{key}")
        if value is not None:
            config[name] = value
    if "num_attention_heads" not in config or "hidden_size" not in config:
        raise InvalidModel(f"{where} lacks {prefix}.attention.head_count or .embedding_length")
    if not config["num_attention_heads"]:
        raise InvalidModel(f"{where} has {prefix}.attention.head_count 0; download it again")
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config["vocab_size"] = len(values.get("tokenizer.ggml.tokens", ())) or values.get(
        f"{prefix}.vocab_size"
    )
    config["tie_word_embeddings"] = "output.weight" not in names
    config["rope_parameters"] = _rope(values, prefix, names, where)
    ids = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    for key, name in ids.items():
        config[name] = values.get(f"tokenizer.ggml.{key}_token_id")
    return config


def _rope(
    values: Mapping[str, Any], prefix: str, names: Mapping[str, Any], where: object
) -> dict[str, Any]:
    """Rotary parameters; factors of frequencies (Llama 3) are a longrope with one table."""
    base = {"rope_theta": values.get(f"{prefix}.rope.freq_base", 10000.0)}
    scaling = values.get(f"{prefix}.rope.scaling.type", "none")
    original = values.get(f"{prefix}.rope.scaling.original_context_length")
    context = values.get(f"{prefix}.context_length")
    if "rope_freqs.weight" in names or "rope_factors_long.weight" in names:
        long = names.get("rope_freqs.weight") or names["rope_factors_long.weight"]
        short = names.get("rope_freqs.weight") or names["rope_factors_short.weight"]
        gain = values.get(f"{prefix}.rope.scaling.attn_factor", 1.0)
        return {
            **base, "rope_type": "longrope", "long_factor": long, "short_factor": short,
            "attention_factor": gain, "factor": 1.0,
            "original_max_position_embeddings": original or context,
        }  # fmt: skip
    if scaling == "none":
        return {**base, "rope_type": "default"}
    factor = values.get(f"{prefix}.rope.scaling.factor")
    if scaling not in ("linear", "yarn") or not factor:
        raise InvalidModel(f"{where} has {prefix}.rope.scaling.type {scaling!r}, factor {factor!r}")
    made = {**base, "rope_type": scaling, "factor": factor}
    return made | ({"original_max_position_embeddings": original} if original else {})


def places(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Iterator[Place]:
    """Where a tensor of the file goes: one place, or one an expert.

    Raises:
        InvalidModel: the architecture has no such tensor, or the model no such layer.
    """
    kind = next(a for a in ARCHITECTURES.values()
                if a.model_type == checkpoint.config["model_type"])  # fmt: skip
    stem, _, leaf = name.rpartition(".")
    if stem in SET_ASIDE:
        return
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    module = {**LAYER, **kind.layer}.get(layer[2]) if layer else OUTER.get(stem)
    if module is None or leaf not in ("weight", "bias"):
        raise InvalidModel(
            f"{checkpoint.path} has a tensor {name!r}, which a {kind.model_type} has not"
        )
    count = checkpoint.config.get(STORED, checkpoint.config.get("num_hidden_layers"))
    if layer and isinstance(count, int) and int(layer[1]) >= count:
        raise InvalidModel(
            f"{checkpoint.path} has a tensor {name!r}, but its block_count is {count}; "
            "download it again"
        )
    full = f"model.layers.{layer[1]}.{module}.{leaf}" if layer else f"{module}.{leaf}"
    heads = _heads(checkpoint, kind, module)
    if not shape or (heads and shape[0] % (2 * heads)):
        divided = f"{heads} heads of rotary pairs" if heads else "rows"
        raise InvalidModel(
            f"tensor {name!r} of {checkpoint.path} has shape {list(shape)}, which is no {divided}; "
            "download it again"
        )
    if "{e}" in full:
        for expert in range(shape[0]):
            yield Place(name=full.format(e=expert), shape=shape[1:], expert=expert)
        return
    yield Place(
        name=full, shape=shape, heads=heads,
        minus_one=kind.norms_plus_one and len(shape) == 1 and "norm" in module,
    )  # fmt: skip


def _heads(checkpoint: Checkpoint, kind: Architecture, module: str) -> int:
    if not kind.interleaved:
        return 0
    fields = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}
    return int(checkpoint.config[fields[module]]) if module in fields else 0
