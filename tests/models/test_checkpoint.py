"""Checkpoints on disk: what is read, what is refused, and how the error reads."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fxlm.compiler.errors import InvalidModel
from fxlm.models.bundled import BUNDLED
from fxlm.models.checkpoint import INDEX, SINGLE, open_checkpoint
from fxlm.models.safetensors_file import SafetensorsFile

CONFIG = {"model_type": "llama", "hidden_size": 8}


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(4, 6),
        "b": torch.randn(3).to(torch.bfloat16),
        "c": torch.arange(5),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), tmp_path / SINGLE)
    return tmp_path


def shard(folder: Path) -> None:
    """Split the single file into two shards."""
    values = tensors()
    (folder / SINGLE).unlink()
    halves = {"m-1.safetensors": ["a"], "m-2.safetensors": ["b", "c", "empty", "scalar"]}
    for name, keys in halves.items():
        save_file({key: values[key] for key in keys}, folder / name)
    weight_map = {key: name for name, keys in halves.items() for key in keys}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("sharded", [False, True])
def test_reads_every_tensor(folder: Path, sharded: bool) -> None:
    if sharded:
        shard(folder)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == CONFIG
    assert checkpoint.generation_config == {}
    assert set(checkpoint.tensors) == set(tensors())
    for name, value in tensors().items():
        assert torch.equal(checkpoint.read(name), value)
        assert checkpoint.tensors[name].shape == tuple(value.shape)
        assert checkpoint.tensors[name].num_bytes == value.nbytes
    assert torch.equal(checkpoint.read_slice("a", 1, 2, 3), tensors()["a"][:, 2:5])
    assert checkpoint.num_bytes == sum(value.nbytes for value in tensors().values())


def test_reads_without_copying(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    left, right = checkpoint.read("a"), checkpoint.read("a")
    assert left.data_ptr() == right.data_ptr()


def test_digest_is_of_shapes_and_config(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    weights = checkpoint.weights_digest()
    values = tensors()
    values["a"] += 1
    save_file(values, folder / SINGLE)
    tuned = open_checkpoint(folder)
    assert tuned.digest() == checkpoint.digest()
    assert tuned.weights_digest() != weights
    (folder / "config.json").write_text(json.dumps(CONFIG | {"transformers_version": "9"}))
    assert open_checkpoint(folder).digest() == checkpoint.digest()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": 9}))
    assert open_checkpoint(folder).digest() != checkpoint.digest()


@pytest.mark.parametrize(
    "name", ["m.g_idx", "m.weight_shape", "m.weight.quant_state.bitsandbytes__nf4"]
)
def test_digest_is_of_values_that_decide_how_weights_are_unpacked(name: str, folder: Path) -> None:
    save_file(tensors() | {name: torch.tensor([0, 1])}, folder / SINGLE)
    before = open_checkpoint(folder).digest()
    save_file(tensors() | {name: torch.tensor([1, 0])}, folder / SINGLE)
    assert open_checkpoint(folder).digest() != before


def refused(folder: Path | str, *words: str, **options: bool) -> None:
    with pytest.raises(InvalidModel) as error:
        open_checkpoint(folder, **options)  # type: ignore[arg-type]
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "text_config"])
def test_settings_that_are_no_object_are_refused(key: str, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {key: []}))
    refused(folder, f"{key} in ", "is [], must be an object")


def test_truncated_file_names_file_and_tensor(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:-8])
    refused(folder, SINGLE, "truncated", "tensor '")
    (folder / SINGLE).write_bytes(data[:20])
    refused(folder, SINGLE, "truncated")
    (folder / SINGLE).write_bytes(b"abc")
    refused(folder, SINGLE, "truncated")
    (folder / SINGLE).write_bytes(b"\xff" * 64)
    refused(folder, "no safetensors file")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, ("takes 8 bytes",)),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, ("shape [-1]",)),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, ("shape",)),
        ({"a": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}, ("dtype 'F3'",)),
        ({"a": {"dtype": "F32", "shape": [1]}}, ("data_offsets",)),
        ({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, ("truncated",)),
        ({"a": 3}, ("data_offsets",)),
        ([], ("not a JSON object",)),
        (
            {
                "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
                "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
            },
            ("'a'", "'b'", "overlap"),
        ),
    ],
)
def test_bad_headers(tmp_path: Path, header: object, words: tuple[str, ...]) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    with pytest.raises(InvalidModel) as error:
        SafetensorsFile(path)
    for word in (*words, str(path)):
        assert word in str(error.value)


def test_misaligned_tensor_is_read(tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    text += b" " * (5 - len(text) % 4)
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<f", 1.5))
    assert SafetensorsFile(path).read("a").item() == 1.5


def test_shards_that_are_missing(folder: Path) -> None:
    shard(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["zzz"] = "m-1.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "m-1.safetensors", "lacks tensor 'zzz'")
    (folder / "m-2.safetensors").unlink()
    refused(folder, "lacks 1 of 2 shards", "m-2.safetensors")
    index["weight_map"]["zzz"] = "../m-1.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "../m-1.safetensors", "no shard")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_refused(folder: Path, name: str) -> None:
    (folder / SINGLE).rename(folder / name)
    refused(folder, name, "save_pretrained", "convert")


def test_what_else_is_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    refused(folder / SINGLE, "is a file")
    (folder / SINGLE).unlink()
    refused(folder, "has no weights")
    (folder / "config.json").write_text("[]")
    refused(folder, "not a JSON object")
    (folder / "config.json").write_text("{")
    refused(folder, "not valid JSON")
    (folder / "config.json").unlink()
    refused(folder, "no config.json")
    (folder / "model.gguf").touch()
    refused(folder, "GGUF")
    (folder / "adapter_config.json").touch()
    refused(folder, "LoRA")
    refused("no/such/place", "no/such/place", "bundled-draft")


def test_remote_code_is_refused_unless_trusted(folder: Path) -> None:
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "c.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "auto_map", "--trust-remote-code")
    assert open_checkpoint(folder, trust_remote_code=True).trust_remote_code
    # A family that transformers has itself needs no code of the checkpoint's.
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "phi3"}))
    assert not open_checkpoint(folder).trust_remote_code


def test_hub_id_offline_says_what_to_do() -> None:
    refused("nobody/no-such-model", "nobody/no-such-model", "hub cache", "hf download")


def test_bundled_names_resolve() -> None:
    for name, path in BUNDLED.items():
        if path.is_dir():
            assert open_checkpoint(name).path == path
