"""Open a checkpoint: a directory, a hub id, or a bundled model.

Here: which files there are, the config as plain JSON, and every tensor mapped. Transformers
is not imported, torch only when a tensor is read. Not here: what the tensors mean
(`fxlm.models.binding`), the file format (`fxlm.models.safetensors_file`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxlm.compiler.errors import InvalidModel
from fxlm.models.safetensors_file import SafetensorsFile, TensorInfo

if TYPE_CHECKING:
    import torch

    from fxlm.models.gguf_file import GgufFile, GgufTensor

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint", "resolve"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# What a snapshot needs: config, weights, tokenizer, template; never pickles.
ALLOW = ["*.json", "model*.safetensors", "*.jinja", "tokenizer.model", "*.tiktoken", "*.txt"]
IGNORE = ["original/*", "onnx/*", "consolidated*"]
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?$")
# Keys of a config that say where it was written, not what the model is.
_VOLATILE = {"transformers_version", "_name_or_path", "name_or_path"}
_SEEN = ("g_idx", ".weight_shape")  # ends of names: groups of inputs, shapes of packed weights


class Checkpoint:
    """An open checkpoint directory.

    Attributes:
        path: the directory.
        source: what the user named.
        config: ``config.json`` as it stands.
        generation_config: ``generation_config.json``, or {} where there is none.
        tensors: every tensor by raw name.
        trust_remote_code: whether Python that comes with the checkpoint may run.
    """

    def __init__(
        self, path: Path, *, source: str | None = None, trust_remote_code: bool = False
    ) -> None:
        """Read config and headers; see `open_checkpoint` for the errors."""
        self.path = path
        self.source = source or str(path)
        self.trust_remote_code = trust_remote_code
        self.config = read_json(path / "config.json")
        _refuse_remote_code(path, self.config, trust_remote_code)
        _require_objects(path, self.config)
        generation = path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else {}
        self._files = _open_files(path)
        self.tensors: Mapping[str, TensorInfo | GgufTensor] = _gather(path, self._files)

    def read(self, name: str) -> torch.Tensor:
        """Return tensor ``name`` as a view of the mapped file: CPU, not copied.

        Raises:
            InvalidModel: there is no such tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise InvalidModel(f"{self.path} has no tensor {name!r}")
        return self._files[info.file.name].read(name)

    def read_slice(self, name: str, dim: int, start: int, length: int) -> torch.Tensor:
        """Return ``length`` indices of dimension ``dim`` from ``start``, as a view."""
        return self.read(name).narrow(dim, start, length)

    def forget(self) -> None:
        """Let pages of mapped files go from this process; tensors that were read stay valid."""
        for file in self._files.values():
            file.forget()

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.num_bytes for info in self.tensors.values())

    def digest(self) -> str:
        """Identity of what a compiler sees: config, tensor names, dtypes and shapes.

        Of quantized checkpoints also the values that decide how weights are unpacked, such as the
        order of groups. The same for two fine-tunes of one model; hexadecimal SHA-256.
        """
        config = {k: v for k, v in self.config.items() if k not in _VOLATILE}
        tensors = {name: [info.dtype, info.shape] for name, info in self.tensors.items()}
        seen = {"config": config, "tensors": tensors, "values": self._values_seen()}
        text = json.dumps(seen, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _values_seen(self) -> dict[str, str]:
        """Digests of the tensors whose values decide the code that unpacks weights."""
        found = {}
        for name, info in self.tensors.items():
            if name.endswith(_SEEN) or ".quant_state." in name:
                with info.file.open("rb") as file:
                    file.seek(info.begin)
                    found[name] = hashlib.sha256(file.read(info.num_bytes)).hexdigest()
        return found

    def weights_digest(self) -> str:
        """Identity of the weights themselves, by size, header and sampled pages of each file.

        Cheap (64 KiB a file), so two files that differ in a few values alone may agree.
        """
        parts = {name: file.sample_digest() for name, file in self._files.items()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _require_objects(path: Path, config: dict[str, Any]) -> None:
    """Nested configs and settings of a quantization are objects, or absent."""
    for key in ("text_config", "quantization_config", "compression_config"):
        for owner in (config, config.get("text_config")):
            value = owner.get(key) if isinstance(owner, dict) else None
            if value is not None and not isinstance(value, dict):
                raise InvalidModel(
                    f"{key} in {path / 'config.json'} is {value!r}, must be an object; "
                    "download the checkpoint again"
                )


def open_checkpoint(
    source: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> Checkpoint:
    """Open a checkpoint.

    Args:
        source: a directory, a GGUF file, a hub id such as ``org/name``, ``bundled`` or
            ``bundled-draft``.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run the Python that comes with the checkpoint.

    Raises:
        InvalidModel: nothing there, damaged, pickled, or in need of code that is not trusted.
    """
    path = resolve(source, revision, trust_remote_code)
    return Checkpoint(path, source=str(source), trust_remote_code=trust_remote_code)


def resolve(
    source: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> Path:
    """Find the directory of ``source``; downloads a hub id that is not in the cache."""
    from fxlm.models.bundled import BUNDLED

    if str(source) in BUNDLED:
        return Path(BUNDLED[str(source)])
    path = Path(source).expanduser()
    if path.is_dir():
        return _gguf_alone(path) or path
    if path.suffix == ".gguf" and path.is_file():
        return gguf_directory(path)
    if path.exists():
        raise InvalidModel(f"{path} is a file; name the directory that holds config.json")
    if not _HUB_ID.match(str(source)):
        raise InvalidModel(
            f"there is no directory {str(source)!r}, and it cannot be a hub id (org/name); "
            f"bundled models are {', '.join(BUNDLED)}"
        )
    return _download(str(source), revision, trust_remote_code)


def _gguf_alone(path: Path) -> Path | None:
    """The directory of the GGUF file that a directory holds, if that is all it holds."""
    found = sorted(path.glob("*.gguf"))
    if not found or any((path / f).is_file() for f in ("config.json", "adapter_config.json")):
        return None
    if len(found) > 1 and not all(re.search(r"-\d{5}-of-\d{5}\.gguf$", f.name) for f in found):
        raise InvalidModel(
            f"{path} holds {len(found)} GGUF files ({', '.join(f.name for f in found[:3])}, ...): "
            "name the one to serve"
        )
    return gguf_directory(found[0])


def gguf_directory(path: Path) -> Path:
    """See `fxlm.models.gguf.directory_of`."""
    from fxlm.models.gguf import directory_of

    return directory_of(path)


def _download(repo_id: str, revision: str | None, trust_remote_code: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    allow = [*ALLOW, "*.py"] if trust_remote_code else ALLOW
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id, revision=revision, allow_patterns=allow, ignore_patterns=IGNORE
        )
    except errors.GatedRepoError as error:
        raise InvalidModel(
            f"{repo_id} is gated: accept its licence on huggingface.co, then set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InvalidModel(f"{repo_id} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise InvalidModel(
            f"there is no directory and no hub model {repo_id!r} (a private one needs HF_TOKEN)"
        ) from error
    except Exception as error:  # network faults come as many classes of several libraries
        raise InvalidModel(
            f"{repo_id} is not a directory here, not in the hub cache, and cannot be downloaded "
            f"({type(error).__name__}): go online, or run `hf download {repo_id}` where there is "
            "a network and give the directory"
        ) from error
    return Path(folder)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InvalidModel: absent, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InvalidModel(_missing(path)) from error
    except OSError as error:
        raise InvalidModel(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidModel(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidModel(f"{path} is not a JSON object")
    return value


def _missing(path: Path) -> str:
    folder = path.parent
    if (folder / "adapter_config.json").is_file():
        return f"{folder} is a LoRA adapter, not a model: merge it into its base model first"
    return f"{folder} is no checkpoint: it has no {path.name}"


def _refuse_remote_code(path: Path, config: dict[str, Any], trusted: bool) -> None:
    if trusted or not config.get("auto_map") or _is_native(config.get("model_type")):
        return
    raise InvalidModel(
        f"{path} brings Python of its own (auto_map in config.json), which would run here; read "
        "it, and if you trust it pass --trust-remote-code (trust_remote_code=True)"
    )


def _is_native(model_type: object) -> bool:
    """Whether transformers has this model itself; looked up without importing it."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None or not isinstance(model_type, str):
        return False
    if not re.fullmatch(r"[\w-]+", model_type):
        return False
    return (Path(spec.origin).parent / "models" / model_type.replace("-", "_")).is_dir()


def _open_files(path: Path) -> Mapping[str, SafetensorsFile | GgufFile]:
    """Open the single file, or every shard of the index, or every part of a GGUF."""
    parts = sorted(path.glob("*.gguf"))
    if parts:
        from fxlm.models.gguf_file import GgufFile

        # By the name that their tensors know: that of the file, not of the link to it.
        return {file.path.name: file for file in (GgufFile(part.resolve()) for part in parts)}
    if (path / SINGLE).is_file():
        return {SINGLE: SafetensorsFile(path / SINGLE)}
    if (path / INDEX).is_file():
        names = sorted(set(_weight_map(path).values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise InvalidModel(
                f"{path} lacks {len(missing)} of {len(names)} shards that {INDEX} names: "
                f"{', '.join(missing[:3])}; download them again"
            )
        return {name: SafetensorsFile(path / name) for name in names}
    pickles = sorted(found.name for pattern in PICKLES for found in path.glob(pattern))
    if pickles:
        raise InvalidModel(
            f"{path} is pickled ({', '.join(pickles[:3])}), and unpickling runs whatever code is "
            "in it: convert it where you trust it, with AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(...), which writes safetensors"
        )
    raise InvalidModel(f"{path} has no weights: neither {SINGLE} nor {INDEX}")


def _weight_map(path: Path) -> dict[str, str]:
    entries = read_json(path / INDEX).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise InvalidModel(f"{path / INDEX} has no weight_map")
    for tensor, name in entries.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise InvalidModel(f"{path / INDEX} puts {tensor!r} into {name!r}, which is no shard")
    return entries


def _gather(
    path: Path, files: Mapping[str, SafetensorsFile | GgufFile]
) -> dict[str, TensorInfo | GgufTensor]:
    tensors: dict[str, TensorInfo | GgufTensor] = {}
    for file in files.values():
        tensors.update(file.tensors)
    if SINGLE in files or next(iter(files)).endswith(".gguf"):
        return tensors
    for tensor, name in _weight_map(path).items():
        info = files[name].tensors.get(tensor)
        if info is None:
            raise InvalidModel(f"{path / name} lacks tensor {tensor!r}, which {INDEX} puts there")
        tensors[tensor] = info
    return tensors
