"""The tokenizer: ids and text equal to transformers'."""

import json
from pathlib import Path
from typing import Any

import pytest

from fxlm.compiler.errors import InvalidModel
from fxlm.models.bundled import BUNDLED
from fxlm.models.tokenizer import Tokenizer
from tests.checkpoints import TEXT, save_tokenizer, train_tokenizer

SAMPLES = [
    *TEXT, "", " ", "a", "  two  spaces ", "</s> inside <s> text", "<extra>x", "I 'm . Don 't ?",
    "tail\n\n", "unseen: ☃ ẞ ﷽",
]  # fmt: skip
CONFIGS: list[dict[str, Any]] = [
    {},
    {"clean_up_tokenization_spaces": True},
    {"add_bos_token": True, "add_eos_token": True},
    {"add_bos_token": False},
    {"split_special_tokens": True},
    {"extra_special_tokens": ["<extra>"]},
]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(c) or "plain")
def test_equals_auto_tokenizer(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    save_tokenizer(train_tokenizer(kind), tmp_path, **named, **config)
    equal(Tokenizer.open(tmp_path), AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_equals_auto_tokenizer(name: str) -> None:
    from transformers import AutoTokenizer

    if not (BUNDLED[name] / "tokenizer.json").is_file():
        pytest.skip("not trained yet")
    equal(Tokenizer.open(BUNDLED[name]), AutoTokenizer.from_pretrained(BUNDLED[name]))


def equal(ours: Tokenizer, theirs: Any) -> None:
    for text in SAMPLES:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), text
            for skip in (True, False):
                expected = theirs.decode(ids, skip_special_tokens=skip)
                assert ours.decode(ids, skip_special_tokens=skip) == expected
    assert ours.encode_batch(SAMPLES) == [ours.encode(text) for text in SAMPLES]
    assert ours.vocab_size == len(theirs)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.pad_token_id == theirs.pad_token_id
    known = theirs.special_tokens_map
    assert {k: v for k, v in ours.special_tokens.items() if k in known} == known


def test_token_bytes_join_to_the_text(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer("bpe"), tmp_path, eos_token="</s>")
    tokenizer = Tokenizer.open(tmp_path)
    for text in SAMPLES:
        joined = b"".join(tokenizer.token_bytes(token) for token in tokenizer.encode(text))
        assert joined.decode() == text
    eos = tokenizer.eos_token_id
    assert eos is not None
    assert tokenizer.token_bytes(eos) == b"</s>"
    assert tokenizer.is_special(eos)
    assert tokenizer.token_bytes(10**6) == b""


def test_eos_ids_come_from_generation_config_first(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer("bpe"), tmp_path, eos_token="</s>")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert Tokenizer.open(tmp_path).eos_token_ids == (7, 2)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    assert Tokenizer.open(tmp_path).eos_token_ids == (8, 9, 2)


def test_no_tokenizer_and_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"no tokenizer\.json"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InvalidModel, match="damaged"):
        Tokenizer.open(tmp_path)
