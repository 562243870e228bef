"""Detokenizer over tokenizers of every kind: the text of all pieces is the text of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxlm.models.tokenizer import Tokenizer
from fxlm.runtime.detokenize import Detokenizer
from tests.checkpoints import TEXT, save_tokenizer, train_tokenizer

SAMPLES = [
    *TEXT, "", " ", "a", "  two  spaces ", "</s> inside <s> text", "tail\n\n", "unseen: ☃ ẞ ﷽",
]  # fmt: skip


def tokenizer(kind: str, path: Path) -> Tokenizer:
    save_tokenizer(train_tokenizer(kind), path, eos_token="</s>")
    return Tokenizer.open(path)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_pieces_join_to_the_whole(kind: str, tmp_path: Path) -> None:
    made = tokenizer(kind, tmp_path)
    for text in SAMPLES:
        ids = made.encode(text)
        stream = Detokenizer(made)
        parts = [stream.push([token]) for token in ids]
        assert all("\ufffd" not in part for part in parts)
        assert "".join(parts) + stream.flush() == made.decode(ids)


def test_half_a_character_is_held(tmp_path: Path) -> None:
    made = tokenizer("bpe", tmp_path)
    ids = made.encode("🐢")
    assert len(ids) > 1
    stream = Detokenizer(made)
    assert stream.push(ids[:-1]) == ""
    assert stream.push(ids[-1:]) == "🐢"
    assert stream.flush() == ""
    cut = Detokenizer(made)
    assert cut.push(ids[:-1]) == ""
    assert cut.flush() == "\ufffd"


def test_garbage_is_not_held_for_ever(tmp_path: Path) -> None:
    made = tokenizer("bpe", tmp_path)
    half = made.encode("🐢")[0]
    stream = Detokenizer(made)
    text = "".join(stream.push([half]) for _ in range(100))
    assert text.count("\ufffd") >= 80
    assert stream.push(made.encode("ok")).endswith("ok")


@pytest.mark.parametrize("kind", ["unigram", "wordpiece"])
def test_goes_on_from_a_prompt(kind: str, tmp_path: Path) -> None:
    made = tokenizer(kind, tmp_path)
    ids = made.encode("one two three")
    prompt, rest = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    stream = Detokenizer(made, prompt)
    text = stream.push(rest) + stream.flush()
    assert made.decode(prompt) + text == made.decode(ids)
