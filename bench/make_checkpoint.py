"""Write a random-weight checkpoint of a real shape, with a fixed seed.

    python bench/make_checkpoint.py llama-1b DIR
    python bench/make_checkpoint.py qwen3-0.6b DIR

Speeds do not depend on the values of weights, so these stand for the real models in every
timing. The tokenizer is that of the bundled model, with made-up words up to the size of the
vocabulary.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    # Llama-3.2-1B
    "llama-1b": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    # Qwen3-0.6B
    "qwen3-0.6b": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}  # fmt: skip


def make(shape: str, path: Path, **overrides: Any) -> None:
    """Write the checkpoint; keyword arguments replace fields of the config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**SHAPES[shape], **overrides}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    bundled = Path(__file__).resolve().parent.parent / "models" / "bundled" / "main"
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(bundled / name, path / name)
    _write_tokenizer(bundled / "tokenizer.json", path / "tokenizer.json", config.vocab_size)
    defaults = {"eos_token_id": config.vocab_size - 1, "do_sample": False}
    (path / "generation_config.json").write_text(json.dumps(defaults) + "\n")


def _write_tokenizer(source: Path, target: Path, size: int) -> None:
    """A word for every id: tokens without text would not be streamed one by one."""
    content = json.loads(source.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    taken = {*vocabulary.values(), *(token["id"] for token in content["added_tokens"])}
    vocabulary |= {f"\u0120w{number}": number for number in range(size) if number not in taken}
    target.write_text(json.dumps(content), encoding="utf-8")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--num-layers", type=int, help="fewer layers, for quick trials")
    options = parser.parse_args()
    overrides = {"num_hidden_layers": options.num_layers} if options.num_layers else {}
    make(options.shape, options.path, **overrides)


if __name__ == "__main__":
    main()
