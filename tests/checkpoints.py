"""Tiny random checkpoints on disk, for tests of any room.

`make_checkpoint("llama", path)` writes config, fp32 weights and (if asked) a tokenizer. The
families that must work are in `FAMILIES`, each with what makes it worth a test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from fxlm.models.tiny import write_checkpoint

# name -> (model type, config fields). Sliding windows are 8: shorter than the tests' prompts.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            "tie_word_embeddings": True,
        },
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "gemma2": ("gemma2", {"sliding_window": 8}),
    "gemma3": ("gemma3_text", {"sliding_window": 8}),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", {}),
    "falcon": ("falcon", {}),
    "granite": ("granite", {"residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "olmo2": ("olmo2", {}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "cohere": ("cohere", {}),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {}),
}  # fmt: skip

TEXT = [
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "def add(a, b):\n    return a + b\n",
    "Ünïcödé, 日本語 and 🦊 emoji; don't panic.",
    "one two three four five six seven eight nine ten " * 4,
]


def make_checkpoint(
    family: str, path: Path | str, *, tokenizer: bool = False, **overrides: Any
) -> Path:
    """Write a tiny random checkpoint.

    Args:
        family: a key of `FAMILIES`, or any model type of transformers.
        path: directory to write.
        tokenizer: write a byte-level BPE of 256 + some tokens, within the model's vocabulary.
        overrides: config fields; ``seed`` and ``dtype`` are those of the weights.

    Returns:
        ``path``.
    """
    model_type, fields = FAMILIES.get(family, (family, {}))
    if tokenizer:
        overrides.setdefault("vocab_size", 320)
    written = write_checkpoint(model_type, path, **{**fields, **overrides})
    if tokenizer:
        save_tokenizer(train_tokenizer("bpe"), written, eos_token="</s>", bos_token="<s>")
    return written


def train_tokenizer(kind: str, vocab_size: int = 310) -> tokenizers.Tokenizer:
    """Train a tokenizer on `TEXT`: ``bpe`` (byte level), ``unigram`` or ``wordpiece``."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "[UNK]"]
    if kind == "bpe":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
    elif kind == "unigram":
        made = tokenizers.Tokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece(cleanup=False)
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=special, show_progress=False
        )
    made.train_from_iterator(TEXT, trainer)
    return made


def save_tokenizer(made: tokenizers.Tokenizer, path: Path | str, **config: Any) -> Path:
    """Write tokenizer.json and tokenizer_config.json as transformers does."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=made, **config).save_pretrained(str(path))
    return Path(path)
