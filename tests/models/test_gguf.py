"""GGUF files as checkpoints: config, names, tokenizer, and what is refused."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from fxlm.compiler.errors import FxlmError, InvalidModel
from fxlm.models.binding import bind
from fxlm.models.build import build_model
from fxlm.models.bundled import BUNDLED
from fxlm.models.checkpoint import open_checkpoint
from fxlm.models.formats import logical_tensors
from fxlm.models.gguf_file import TYPES, GgufFile
from fxlm.models.gguf_names import config_of
from fxlm.models.shorten import shorten
from fxlm.models.tokenizer import Tokenizer
from tests.checkpoints import TEXT, make_checkpoint
from tests.models.gguf_writing import write_gguf

FAMILIES = ("llama", "llama3", "qwen2", "qwen3", "gemma2", "mixtral", "qwen3_moe")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made(path: Path, family: str = "llama", kind: str = "F32") -> Path:
    # llama.cpp always normalizes the weights of the experts that were chosen.
    more = {"norm_topk_prob": True} if family == "qwen3_moe" else {}
    source = make_checkpoint(family, path / "source", tokenizer=True, **more)
    return write_gguf(source, path / "m.gguf", kind)


def header_of(path: Path, name: bytes) -> tuple[bytearray, int]:
    """The file, and where the type of a matrix stands, before its offset."""
    data = bytearray(path.read_bytes())
    return data, data.index(name) + len(name) + 4 + 2 * 8


def parameters(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path)
    binding = bind(checkpoint, build_model(checkpoint, torch.float32))
    assert binding.unused in ([], ["rope_freqs.weight"])
    return binding.convert({name: checkpoint.read(name) for name in binding.names})


def logits(path: Path) -> torch.Tensor:
    """Of the model as transformers builds it from our config and our weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = parameters(path)
    config = {**open_checkpoint(path).config}
    config.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), dtype=torch.float32
    ).eval()
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert not unexpected
    assert all("lm_head" in name for name in missing), missing
    model.tie_weights()
    with torch.no_grad():
        result: torch.Tensor = model(torch.tensor([[3, 17, 99, 4, 5, 200, 17] * 3])).logits
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_the_one_that_was_written(family: str, tmp_path: Path) -> None:
    path = made(tmp_path, family)
    torch.testing.assert_close(logits(path), logits(tmp_path / "source"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("Q8_0", "bfloat16")]
)
def test_what_to_compute_in_follows_the_matrices(kind: str, dtype: str, tmp_path: Path) -> None:
    assert open_checkpoint(made(tmp_path, "llama", kind)).config["dtype"] == dtype


def test_a_quantized_model_stays_close(tmp_path: Path) -> None:
    path = made(tmp_path, "llama", "Q8_0")
    found, expected = parameters(path), parameters(tmp_path / "source")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(found[name], expected[name])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.02, atol=0.02)


def test_the_tokenizer_is_the_one_that_was_written(tmp_path: Path) -> None:
    source = Path(BUNDLED["bundled"])
    texts = [*TEXT, "12345 apples<|end|> and\n\n  more", "x = 3.14159"]
    before = Tokenizer.open(source)
    import gguf

    from tests.models.gguf_writing import write_vocabulary

    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    config = json.loads((source / "config.json").read_text())
    write_vocabulary(writer, source, config["vocab_size"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    from fxlm.models.gguf_tokenizer import write_tokenizer

    values = GgufFile(tmp_path / "v.gguf").values
    write_tokenizer(values, tmp_path, "v.gguf")
    after = Tokenizer.open(tmp_path)
    for text in texts:
        assert after.encode(text) == before.encode(text)
        assert after.decode(before.encode(text)) == before.decode(before.encode(text))


def test_sentencepiece_merges_by_score(tmp_path: Path) -> None:
    from fxlm.models.gguf_tokenizer import write_tokenizer

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "c", "ab", "bc", "▁a", "abc"]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -4.0]
    values = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores, "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 8],
    }  # fmt: skip
    write_tokenizer(values, tmp_path, "m.gguf")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    # "bc" has the best score, so "abc" is a + bc; nothing makes "abc" of ▁a and bc.
    assert tokenizer.encode("abc").tokens == ["<s>", "▁a", "bc"]
    assert tokenizer.encode("é").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("abc é").ids) == "abc é"


def test_an_unknown_pattern_is_refused(tmp_path: Path) -> None:
    from fxlm.models.gguf_tokenizer import write_tokenizer

    values = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"],
        "tokenizer.ggml.pre": "tekken",
    }  # fmt: skip
    with pytest.raises(InvalidModel, match="pattern 'tekken'"):
        write_tokenizer(values, tmp_path, "m.gguf")


def test_the_directory_is_made_once(tmp_path: Path, cache: Path) -> None:
    path = made(tmp_path)
    first = open_checkpoint(path).path
    stamp = (first / "config.json").stat().st_mtime_ns
    assert open_checkpoint(path).path == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    assert [p.name for p in (cache / "fxlm" / "gguf").iterdir()] == [first.name]


def test_a_directory_with_one_file_is_that_file(tmp_path: Path) -> None:
    path = made(tmp_path)
    folder = tmp_path / "alone"
    folder.mkdir()
    path.rename(folder / "m.gguf")
    assert open_checkpoint(folder).config["model_type"] == "llama"


def test_its_first_layers_are_a_checkpoint(tmp_path: Path) -> None:
    whole = open_checkpoint(made(tmp_path))
    (tmp_path / "short").mkdir()
    short = shorten(whole, 1, tmp_path / "short")
    assert bind(short, build_model(short, torch.float32)).targets


def test_two_files_must_be_told_apart(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(InvalidModel, match=r"2 GGUF files \(a.gguf, b.gguf"):
        open_checkpoint(tmp_path)


def test_types_of_equal_width_have_different_digests(tmp_path: Path) -> None:
    path = made(tmp_path, "llama", "F16")
    before = open_checkpoint(path).digest()
    data, place = header_of(path, b"blk.0.attn_q.weight")
    assert struct.unpack_from("<I", data, place) == (1,)
    struct.pack_into("<I", data, place, 30)  # BF16
    path.write_bytes(data)
    assert open_checkpoint(path).digest() != before


@pytest.mark.parametrize("kind", [3, 6])  # Q4_1, Q5_0: wider
def test_a_type_that_does_not_fill_its_place_is_refused(kind: int, tmp_path: Path) -> None:
    path = made(tmp_path, "llama", "Q4_0")
    data, place = header_of(path, b"blk.0.attn_q.weight")
    struct.pack_into("<I", data, place, kind)
    path.write_bytes(data)
    with pytest.raises(InvalidModel, match=r"begins at byte .*'blk.0.attn_q.weight' \(Q._.\) ends"):
        open_checkpoint(path)


def test_a_tensor_within_another_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path)
    data, place = header_of(path, b"blk.0.attn_q.weight")
    (offset,) = struct.unpack_from("<Q", data, place + 4)
    struct.pack_into("<Q", data, place + 4, offset - 32)
    path.write_bytes(data)
    with pytest.raises(InvalidModel, match="an offset in the header is wrong"):
        open_checkpoint(path)


@pytest.mark.parametrize("keep", [3, 20, 200, 5000, -7])
def test_a_truncated_file_is_refused(keep: int, tmp_path: Path) -> None:
    path = made(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InvalidModel, match=r"truncated|no GGUF file"):
        open_checkpoint(path)


def test_an_unknown_tensor_type_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path)
    data = bytearray(path.read_bytes())
    place = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 2 * 8
    struct.pack_into("<I", data, place, 16)  # IQ2_XXS
    path.write_bytes(data)
    with pytest.raises(InvalidModel, match=r"attn_q.weight' of .* has ggml type 16"):
        open_checkpoint(path)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path)
    data = path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0rwkv9", 1)
    path.write_bytes(data)
    with pytest.raises(InvalidModel, match="architecture 'rwkv9'"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (b"llama.attention.head_count", 0, "attention.head_count 0"),
        (b"llama.block_count", 1, r"has a tensor 'blk\.1\..*, but its block_count is 1"),
    ],
)
def test_counts_that_contradict_the_tensors_are_refused(
    key: bytes, value: int, message: str, tmp_path: Path
) -> None:
    path = made(tmp_path)
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(key) + len(key) + 4, value)  # behind its type
    path.write_bytes(data)
    with pytest.raises(InvalidModel, match=message):
        logical_tensors(open_checkpoint(path))


def written(path: Path, kind: str) -> bytes:
    """The smallest file with a matrix of ``kind``, zeros, and a vocabulary."""
    import gguf

    number = next(number for number, entry in TYPES.items() if entry[0] == kind)
    _, block, width = TYPES[number]
    writer = gguf.GGUFWriter(path, "llama")
    for add in (writer.add_embedding_length, writer.add_feed_forward_length):
        add(256)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "<s>", "ab"])
    writer.add_token_types([1, 1, 3, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("output_norm.weight", np.ones(256, np.float32))
    for name in ("token_embd.weight", "blk.0.attn_q.weight"):
        rows = np.zeros((8, 256 // block * width), np.uint8)
        as_they_are = rows.view(np.float16) if kind == "F16" else rows
        writer.add_tensor(name, as_they_are, raw_dtype=gguf.GGMLQuantizationType(number))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def damaged(data: bytes, header: int, chance: random.Random) -> bytes:
    """Cut off, or with a few bits or a number of its header changed."""
    if chance.random() < 0.2:
        return data[: chance.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 3))):
        place = chance.randrange(header - 8)
        if chance.random() < 0.6:
            changed[place] ^= 1 << chance.randrange(8)
        else:
            struct.pack_into("<Q", changed, place, chance.choice((0, 1, 2**31, 2**63, 2**64 - 1)))
    return bytes(changed)


@pytest.mark.parametrize("kind", [entry[0] for entry in TYPES.values()])
def test_a_damaged_header_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    data = written(path, kind)
    header = min(tensor.begin for tensor in GgufFile(path).tensors.values())
    assert logical_tensors(open_checkpoint(path))
    chance = random.Random(kind)
    said = []
    for _ in range(25):
        path.write_bytes(damaged(data, header, chance))
        try:
            checkpoint = open_checkpoint(path)
            for tensor in logical_tensors(checkpoint).values():
                tensor.build(*(checkpoint.read(source) for source in tensor.sources))
        except FxlmError as error:
            said.append(str(error))
    assert "\n".join(said).encode()  # they can be printed


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.embedding_length", 256.5, "is 256.5, must be a whole number"),
        ("llama.attention.head_count", 2**31, "is 2147483648, must be a whole number"),
        ("llama.rope.freq_base", float("nan"), "is nan, must be a finite number"),
        ("tokenizer.ggml.bos_token_id", 4, "is 4, must be below 4, the number of tokens"),
        ("tokenizer.ggml.token_type", [1], r"is \[1\], must have one for each of 4 tokens"),
        ("tokenizer.ggml.tokens", ["\udc80"], "must be a list of texts in UTF-8"),
        ("tokenizer.ggml.merges", ["a c"], "has 'a c', which does not make a token of two"),
        ("tokenizer.chat_template", 1, "is 1, must be text in UTF-8"),
    ],
)
def test_a_value_of_another_kind_is_refused(
    key: str, value: Any, message: str, tmp_path: Path
) -> None:
    from fxlm.models.gguf_tokenizer import write_tokenizer

    written(tmp_path / "m.gguf", "F16")
    values = {**GgufFile(tmp_path / "m.gguf").values, key: value}

    def read() -> None:
        config_of(values, {}, "m.gguf")
        write_tokenizer(values, tmp_path, "m.gguf")

    with pytest.raises(InvalidModel, match=message):
        read()


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (6, struct.pack("<f", 32.5), r"alignment 32\.5, must be a multiple of 8"),
        (9, struct.pack("<IQ", 9, 1) * 5000, "arrays in arrays"),
    ],
)
def test_a_header_is_refused(kind: int, value: bytes, message: str, tmp_path: Path) -> None:
    key = b"general.alignment"
    start = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + struct.pack("<I", kind)
    (tmp_path / "m.gguf").write_bytes(start + value)
    with pytest.raises(InvalidModel, match=message):
        GgufFile(tmp_path / "m.gguf")


def test_an_empty_tensor_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path)
    data, place = header_of(path, b"blk.0.attn_q.weight")
    struct.pack_into("<QQ", data, place - 16, 0, 2**40)
    path.write_bytes(data)
    with pytest.raises(InvalidModel, match=r"attn_q.weight' .* has sizes \[1099511627776, 0\]"):
        open_checkpoint(path)
