"""Write a GGUF file of a Llama or Qwen3 checkpoint, for llama.cpp in the comparison.

    python bench/make_gguf.py CHECKPOINT OUT.gguf [--type Q4_0]

Tensors stay bfloat16 (norms are float32, as llama.cpp wants them), or all matrices but embedding
and head get the type, if gguf-py can write it. For Llama it pairs rotary
dimensions (2i, 2i+1), so q and k are permuted; for Qwen3 it pairs them as transformers does. The
tokenizer is written as byte-level BPE, padded to the vocabulary size, with the pattern of the
bundled model if its digits are single. llama.cpp's own converter knows every model; this
does not need the names of known tokenizers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from fxlm.models.checkpoint import Checkpoint, open_checkpoint

LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def main() -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--type", default="BF16", help="of matrices")
    options = parser.parse_args()
    make(options.checkpoint, options.output, options.type)


def make(source: Path, target: Path, kind: str = "BF16") -> None:
    """Write the file; matrices but embedding and head are of this type of gguf-py's."""
    checkpoint = open_checkpoint(source)
    writer: Any = gguf.GGUFWriter(target, checkpoint.config["model_type"])
    write_config(writer, checkpoint.config)
    write_tokenizer(writer, checkpoint)
    for name in checkpoint.tensors:
        write_tensor(writer, checkpoint, name, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_config(writer: Any, config: dict[str, Any]) -> None:
    """Sizes and constants under the keys of the architecture."""
    heads = config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_name("bench")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def write_tokenizer(writer: Any, checkpoint: Checkpoint) -> None:
    """Byte-level BPE, with unused tokens up to the size of the vocabulary."""
    content = json.loads((checkpoint.path / "tokenizer.json").read_text(encoding="utf-8"))
    known = content["model"]["vocab"] | {t["content"]: t["id"] for t in content["added_tokens"]}
    names = {number: token for token, number in known.items()}
    size = checkpoint.config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    digits = "Digits" in json.dumps(content["pre_tokenizer"])
    writer.add_tokenizer_pre("smollm" if digits else "gpt-2")
    writer.add_token_list([names.get(i, f"[unused{i}]") for i in range(size)])
    added = {token["content"] for token in content["added_tokens"]}
    kinds = [
        gguf.TokenType.UNUSED if i not in names
        else gguf.TokenType.CONTROL if names[i] in added else gguf.TokenType.NORMAL
        for i in range(size)
    ]  # fmt: skip
    writer.add_token_types(kinds)
    merges = content["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    beside = checkpoint.path / "generation_config.json"
    last = json.loads(beside.read_text(encoding="utf-8"))["eos_token_id"]
    writer.add_eos_token_id(last[0] if isinstance(last, list) else last)
    settings = json.loads((checkpoint.path / "tokenizer_config.json").read_text(encoding="utf-8"))
    if settings.get("bos_token"):
        writer.add_bos_token_id(known[settings["bos_token"]])
    template = checkpoint.path / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def write_tensor(writer: Any, checkpoint: Checkpoint, name: str, kind: str) -> None:
    """One tensor under llama.cpp's name."""
    stem, _, leaf = name.rpartition(".")
    if stem.startswith("model.layers."):
        number, _, rest = stem.removeprefix("model.layers.").partition(".")
        stem = f"blk.{number}.{LAYER[rest]}"
    else:
        stem = OUTER[stem]
    value = checkpoint.read(name)
    if checkpoint.config["model_type"] == "llama" and stem.endswith((".attn_q", ".attn_k")):
        value = _interleaved(value, checkpoint.config)
    if value.dim() == 1:
        writer.add_tensor(f"{stem}.{leaf}", value.float().numpy())
        return
    if kind != "BF16" and stem not in OUTER.values():
        quantized = gguf.GGMLQuantizationType[kind]
        coded = gguf.quants.quantize(value.float().numpy(), quantized)
        writer.add_tensor(f"{stem}.{leaf}", coded, raw_dtype=quantized)
        return
    raw = value.to(torch.bfloat16).contiguous().view(torch.uint16).numpy().view(np.uint8)
    writer.add_tensor(f"{stem}.{leaf}", raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


def _interleaved(weight: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Rows of each head from halves to pairs: [heads, 2, dim / 2] -> [heads, dim / 2, 2]."""
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    split = weight.view(-1, 2, dim // 2, weight.shape[1])
    return split.transpose(1, 2).reshape(weight.shape)


if __name__ == "__main__":
    main()
