"""A GGUF file as a checkpoint directory, made once.

``fxlm serve model.gguf``: what a directory would hold as texts (config.json, tokenizer.json, the
chat template, generation_config.json) is written from the file's header into the cache, beside
links to the file or its parts. Everything else sees a directory. The weights stay in the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fxlm.compiler.cache import cache_directory
from fxlm.compiler.errors import InvalidModel
from fxlm.models.gguf_file import GgufFile
from fxlm.models.gguf_names import SET_ASIDE, config_of

LAYOUT = "2"  # of what is written; another one is made anew
_PART = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<total>\d{5})\.gguf$")
# Tokens that end a turn, beside the end of the text.
_TURN_ENDS = ("eot", "eom")


def directory_of(path: Path) -> Path:
    """The directory that stands for a GGUF file, written if it is not there yet.

    Args:
        path: of the file, or of any part of a split one.

    Raises:
        InvalidModel: no GGUF file, a part is missing, an architecture that is not known, or a
            cache that cannot be written.
    """
    parts = _parts(path.resolve())
    files = [GgufFile(part) for part in parts]
    identity = [LAYOUT, *(f"{file.path} {file.sample_digest()}" for file in files)]
    name = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:32]
    place = cache_directory() / "gguf" / name
    if (place / "config.json").is_file():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=place.parent))
    except OSError as error:
        raise InvalidModel(f"{place.parent} cannot be written ({error.strerror})") from error
    try:
        _write(work, files)
        os.rename(work, place)
    except OSError as error:
        if not (place / "config.json").is_file():  # else somebody else was faster
            raise InvalidModel(f"{place} cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return place


def _parts(path: Path) -> list[Path]:
    found = _PART.match(path.name)
    if found is None:
        return [path]
    total = int(found["total"])
    names = [f"{found['stem']}-{n:05d}-of-{total:05d}.gguf" for n in range(1, total + 1)]
    parts = [path.with_name(name) for name in names]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise InvalidModel(f"{path.parent} lacks {', '.join(missing[:3])} of {total} parts")
    return parts


def _dtype_of(files: list[GgufFile]) -> str:
    """What to compute in, which a file does not state: what its matrices are stored in.

    Quantized ones come of 16-bit models; vectors are float32 in every file.
    """
    tensors = (tensor for file in files for tensor in file.tensors.values())
    found = {tensor.dtype for tensor in tensors if len(tensor.dense_shape) > 1}
    if found <= {"F32"}:
        return "float32"
    return "float16" if found <= {"F16", "F32"} else "bfloat16"


def _write(work: Path, files: list[GgufFile]) -> None:
    from fxlm.models.gguf_tokenizer import write_tokenizer

    values = files[0].values
    names: dict[str, Any] = {name: None for file in files for name in file.tensors}
    for file in files:
        for name in file.tensors:
            if name.removesuffix(".weight") in SET_ASIDE:
                names[name] = file.read(name).tolist()
    config = config_of(values, names, files[0].path)
    config["quantization_config"] = {"quant_method": "gguf"}
    config["dtype"] = _dtype_of(files)
    (work / "config.json").write_text(json.dumps(config, indent=1))
    ends = [values.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", *_TURN_ENDS)]
    numbers = [number for number in dict.fromkeys(ends) if number is not None]
    (work / "generation_config.json").write_text(json.dumps({"eos_token_id": numbers}))
    write_tokenizer(values, work, files[0].path)
    for number, file in enumerate(files):
        (work / f"model-{number:05d}.gguf").symlink_to(file.path)
