"""What training writes: resumable checkpoints, and the exported model folders.

A checkpoint is one safetensors file: weights, optimizer states, and in its
metadata the progress as JSON. An exported folder is a standard Hugging Face
one, weights in bf16.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fxlm.models.bundled.data import BOS, CHAT_TEMPLATE, EOS, PAD, SPECIAL_TOKENS

MAX_POSITIONS = 2048
Optimizers = Sequence[torch.optim.Optimizer]


def _optimizer_tensors(optimizers: Optimizers) -> dict[str, Tensor]:
    """Each state tensor as `optimizer.<which>.<parameter>.<name>`."""
    return {
        f"optimizer.{which}.{parameter}.{name}": value.contiguous()
        for which, optimizer in enumerate(optimizers)
        for parameter, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def save_checkpoint(
    path: Path, model: LlamaForCausalLM, optimizers: Optimizers, progress: dict[str, Any]
) -> None:
    """Write under another name and rename, so that a killed run leaves a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": value for name, value in model.named_parameters()}
    started = path.with_suffix(".new")
    tensors = {name: value.detach() for name, value in weights.items()}
    save_file(tensors | _optimizer_tensors(optimizers), started, {"progress": json.dumps(progress)})
    started.rename(path)


def load_checkpoint(path: Path, model: LlamaForCausalLM, optimizers: Optimizers) -> dict[str, Any]:
    """Fill the model and the optimizers. Returns the progress."""
    with safe_open(path, "pt") as file, torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(file.get_tensor(f"model.{name}"))
        for which, optimizer in enumerate(optimizers):
            saved = optimizer.state_dict()
            saved["state"] = {}
            for key in file.keys():  # noqa: SIM118 (not a dict)
                parts = key.split(".")
                if parts[:2] == ["optimizer", str(which)]:
                    saved["state"].setdefault(int(parts[2]), {})[parts[3]] = file.get_tensor(key)
            optimizer.load_state_dict(saved)
        progress: dict[str, Any] = json.loads(file.metadata()["progress"])
    return progress


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja.

    The class and the field of the extra tokens are renamed to what
    transformers 4 reads as well.
    """
    extra = [token for token in SPECIAL_TOKENS if token not in (BOS, EOS, PAD)]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=extra,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("extra_special_tokens", None)
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": extra,
        "chat_template": CHAT_TEMPLATE,
    }
    path.write_text(json.dumps(config, indent=2) + "\n")


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a model folder that `from_pretrained` reads with no code of ours."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**(model.config.to_dict() | {"use_cache": True}))
    plain = LlamaForCausalLM(config).bfloat16()
    weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    plain.load_state_dict(weights)
    plain.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=[config.eos_token_id],
        pad_token_id=config.pad_token_id,
        do_sample=True,
        temperature=0.3,
        top_p=0.95,
    )
    plain.save_pretrained(folder)
    write_tokenizer(tokenizer, folder)
    for path in folder.iterdir():
        path.chmod(0o644)
