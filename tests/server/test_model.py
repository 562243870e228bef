"""What the server reads of a checkpoint: tokenizer, template, end tokens, defaults, names."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from fxlm.compiler.errors import InvalidModel, InvalidOption
from fxlm.runtime.launch import EngineSpec
from fxlm.runtime.messages import EngineInfo
from fxlm.server import cli
from fxlm.server.engine import open_model, sized
from fxlm.server.served import ServedModel

INFO = EngineInfo(
    vocab_size=300,
    max_model_len=128,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    num_blocks=10,
    block_size=16,
)


def checkpoint(path: Path, **generation: Any) -> Path:
    """A directory with a byte-level tokenizer and a template."""
    path.mkdir(exist_ok=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(path / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def opened(path: Path, *flags: str) -> ServedModel:
    spec = EngineSpec(factory="", kwargs={}, name="org/name", directory=path, tokenizer=path)
    return sized(open_model(spec, cli.parse(["serve", *flags])), INFO)


def test_open(tmp_path: Path) -> None:
    path = checkpoint(
        tmp_path,
        eos_token_id=[5, 6, 300],
        temperature=0.6,
        top_k=20,
        do_sample=True,
        top_p=None,
        min_p="x",
        max_length=20,
    )
    served = opened(path)
    assert served.names == ("org/name",)
    assert (served.max_model_len, served.vocab_size, served.max_num_seqs) == (128, 300, 4)
    assert served.defaults == {"temperature": 0.6, "top_k": 20}
    assert served.eos_token_ids == (5, 6, 257)
    assert served.chat_template is not None
    assert served.chat_template.render([{"role": "user", "content": "hi"}]) == "<s>hi"
    ids = served.tokenizer.encode("ö", add_special_tokens=False)
    assert b"".join(map(served.tokenizer.token_bytes, ids)) == "ö".encode()


def test_names(tmp_path: Path) -> None:
    served = opened(checkpoint(tmp_path), "--served-model-name", "a", "b")
    assert served.names == ("a", "b")


def test_chat_template(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model")
    messages = [{"role": "user", "content": "hi"}]
    (tmp_path / "t.jinja").write_text("file {{ eos_token }}")
    for choice, said in ((str(tmp_path / "t.jinja"), "file </s>"), ("text {{ 1 }}", "text 1")):
        served = opened(path, "--chat-template", choice)
        assert served.chat_template is not None
        assert served.chat_template.render(messages) == said
    with pytest.raises(InvalidOption, match="--chat-template"):
        opened(path, "--chat-template", str(tmp_path / "missing"))
    with pytest.raises(InvalidModel):
        opened(path, "--chat-template", "{% if %}")


def test_no_template(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    (path / "tokenizer_config.json").write_text("{}")
    assert opened(path).chat_template is None


def test_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidModel):
        opened(tmp_path)
