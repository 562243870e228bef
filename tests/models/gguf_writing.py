"""Write GGUF files of tiny checkpoints, with gguf-py and its table of names."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from fxlm.models.checkpoint import Checkpoint, open_checkpoint

ARCHITECTURES = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}
# Config field -> method of the writer.
FIELDS = {
    "max_position_embeddings": "add_context_length", "hidden_size": "add_embedding_length",
    "num_hidden_layers": "add_block_count", "intermediate_size": "add_feed_forward_length",
    "num_attention_heads": "add_head_count", "num_key_value_heads": "add_head_count_kv",
    "head_dim": "add_key_length", "rms_norm_eps": "add_layer_norm_rms_eps",
    "sliding_window": "add_sliding_window", "num_local_experts": "add_expert_count",
    "num_experts": "add_expert_count", "num_experts_per_tok": "add_expert_used_count",
    "moe_intermediate_size": "add_expert_feed_forward_length",
    "attn_logit_softcapping": "add_attn_logit_softcapping",
    "final_logit_softcapping": "add_final_logit_softcapping",
}  # fmt: skip


def write_gguf(source: Path, target: Path, kind: str = "F32") -> Path:
    """Write ``target`` from the checkpoint at ``source``; matrices as tensors of ``kind``."""
    checkpoint = open_checkpoint(source)
    config = checkpoint.config
    model_type = config["model_type"]
    name = ARCHITECTURES.get(model_type, model_type)
    writer: Any = gguf.GGUFWriter(target, name)
    for field, method in FIELDS.items():
        if config.get(field) is not None:
            getattr(writer, method)(config[field])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    write_vocabulary(writer, source, config["vocab_size"])
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == name)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    for hf, value in sorted(stacked(checkpoint).items()):
        written = names.get_name(hf, try_suffixes=(".weight", ".bias"))
        assert written is not None, hf
        add_tensor(writer, written, changed(hf, value, config, name), kind)
    add_factors(writer, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def stacked(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Tensors by name; the experts of a layer as one, as the file has them."""
    made: dict[str, torch.Tensor] = {}
    experts: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name in sorted(checkpoint.tensors, key=lambda n: [int(p) if p.isdigit() else -1
                                                          for p in n.split(".")]):  # fmt: skip
        before, found, after = name.partition(".experts.")
        if found:
            experts[f"{before}.experts.{after.partition('.')[2]}"].append(checkpoint.read(name))
        else:
            made[name] = checkpoint.read(name)
    return made | {name: torch.stack(parts) for name, parts in experts.items()}


def changed(name: str, value: torch.Tensor, config: dict[str, Any], arch: str) -> torch.Tensor:
    """What llama.cpp's converter does to values."""
    if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
        rows = value.view(config[key], 2, -1, value.shape[-1])
        return rows.transpose(1, 2).reshape(value.shape)
    if arch == "gemma2" and "norm" in name:
        return value + 1
    return value


def add_tensor(writer: Any, name: str, value: torch.Tensor, kind: str) -> None:
    dense = value.float().numpy()
    if value.dim() < 2 or kind == "F32":
        writer.add_tensor(name, dense)
        return
    if "ffn_gate_inp" in name:
        writer.add_tensor(name, dense)  # routers stay as they are
        return
    quantized = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(dense, quantized), raw_dtype=quantized)


def add_factors(writer: Any, config: dict[str, Any]) -> None:
    """Factors of rotary frequencies of Llama 3, as the converter computes them."""
    rope = config["rope_parameters"]
    if rope["rope_type"] != "llama3":
        return
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    full = AutoConfig.for_model(**config)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](full, device=None)
    dim = config["head_dim"]
    base = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
    writer.add_tensor("rope_freqs.weight", (base / scaled).numpy().astype(np.float32))


def write_vocabulary(writer: Any, source: Path, size: int) -> None:
    """Byte-level BPE as the checkpoint's tokenizer.json has it; unused tokens up to the size."""
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    known = content["model"]["vocab"] | added
    names = {number: token for token, number in known.items()}
    kinds = [
        gguf.TokenType.UNUSED if i not in names
        else gguf.TokenType.CONTROL if names[i] in added else gguf.TokenType.NORMAL
        for i in range(size)
    ]  # fmt: skip
    writer.add_tokenizer_model("gpt2")
    digits = "Digits" in json.dumps(content["pre_tokenizer"])
    writer.add_tokenizer_pre("smollm" if digits else "gpt-2")
    writer.add_token_list([names.get(i, f"[unused{i}]") for i in range(size)])
    writer.add_token_types(kinds)
    merges = content["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    for name in ("bos", "eos"):
        if (token := settings.get(f"{name}_token")) is not None:
            getattr(writer, f"add_{name}_token_id")(known[token])
    if content["post_processor"] and "TemplateProcessing" in json.dumps(content["post_processor"]):
        writer.add_add_bos_token(True)
    if (source / "chat_template.jinja").is_file():
        writer.add_chat_template((source / "chat_template.jinja").read_text())
