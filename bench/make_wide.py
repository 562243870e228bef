"""Write the bundled model at the size of Llama-3.2-1B: the same function, the cost of a real model.

    python bench/make_wide.py DIR

Speculative decoding pays by what a step of the target costs beside a step of the draft, and by how
often the two agree. This target has the layers of the 1B shape (hidden size 2048, 16 layers, 32
heads; the vocabulary stays) and the bundled model's texts, so that the bundled draft drafts for it
as it does for the small one. What is added changes nothing: hidden units beyond the bundled
model's stay zero, as no layer writes to them; heads, intermediate units and whole layers beyond
them are read by columns of zeros. All other weights are random, so no product is skipped. Norms
average over eight times as many units, seven of eight zero, which their weights make up for.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from make_checkpoint import SHAPES

SOURCE = Path(__file__).resolve().parent.parent / "models" / "bundled" / "main"
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads")  # fmt: skip
WIDE: dict[str, int] = {name: SHAPES["llama-1b"][name] for name in SIZES}


def make(path: Path) -> None:
    """Write the checkpoint."""
    config = json.loads((SOURCE / "config.json").read_text(encoding="utf-8"))
    narrow = load_file(SOURCE / "model.safetensors")
    torch.manual_seed(0)
    hidden, size = config["hidden_size"], WIDE["hidden_size"]
    wide = {"model.embed_tokens.weight": torch.zeros(config["vocab_size"], size)}
    wide["model.embed_tokens.weight"][:, :hidden] = narrow["model.embed_tokens.weight"]
    wide["model.norm.weight"] = _norm(narrow["model.norm.weight"], size)
    for layer in range(WIDE["num_hidden_layers"]):
        wide |= _layer(narrow if layer < config["num_hidden_layers"] else {}, layer, config)
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.bfloat16().contiguous() for name, value in wide.items()},
        path / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    config |= WIDE | {"rms_norm_eps": config["rms_norm_eps"] * hidden / size}
    (path / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for file in SOURCE.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copyfile(file, path / file.name)


def _norm(weight: torch.Tensor, size: int) -> torch.Tensor:
    """The root of the mean is smaller by that of the share of units that are not zero."""
    wide = torch.zeros(size)
    wide[: len(weight)] = weight.float() * math.sqrt(len(weight) / size)
    return wide


def _layer(
    narrow: dict[str, torch.Tensor], layer: int, config: dict[str, int]
) -> dict[str, torch.Tensor]:
    """Weights of a layer that does what the narrow one does, or nothing if there is none."""
    size, inner, width = WIDE["hidden_size"], WIDE["intermediate_size"], config["head_dim"]
    heads, kv_heads = WIDE["num_attention_heads"], WIDE["num_key_value_heads"]
    prefix = f"model.layers.{layer}."
    shapes = {
        "self_attn.q_proj": (heads * width, size), "self_attn.k_proj": (kv_heads * width, size),
        "self_attn.v_proj": (kv_heads * width, size), "self_attn.o_proj": (size, heads * width),
        "mlp.gate_proj": (inner, size), "mlp.up_proj": (inner, size),
        "mlp.down_proj": (size, inner),
    }  # fmt: skip
    made = {f"{prefix}{name}.weight": torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    for name in ("self_attn.o_proj", "mlp.down_proj"):  # the only ones that write to the stream
        made[f"{prefix}{name}.weight"].zero_()
    for name in ("input_layernorm", "post_attention_layernorm"):
        found = narrow.get(f"{prefix}{name}.weight", torch.ones(config["hidden_size"]))
        made[f"{prefix}{name}.weight"] = _norm(found, size)
    if not narrow:
        return made
    # A query head keeps its key head: groups are longer, their first heads are the narrow ones'.
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    places = [
        (head // group) * (heads // kv_heads) + head % group
        for head in range(config["num_attention_heads"])
    ]
    queries = torch.cat([torch.arange(width) + place * width for place in places])
    hidden = torch.arange(config["hidden_size"])
    keys = torch.arange(config["num_key_value_heads"] * width)
    units = torch.arange(config["intermediate_size"])
    where = {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (units, hidden), "mlp.up_proj": (units, hidden),
        "mlp.down_proj": (hidden, units),
    }  # fmt: skip
    for name, (rows, columns) in where.items():
        key = f"{prefix}{name}.weight"
        made[key][rows[:, None], columns] = narrow[key].float()
    return made


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path)
    make(parser.parse_args().path)


if __name__ == "__main__":
    main()
