"""Prepared weights on disk: packed and quantized once, mapped by every start after that.

The load graph's results are written to one safetensors file beside the artifacts, named by the
digest of what decides them: the checkpoint's files, the load graph, the ops that it calls. The
next start maps the file: nothing is packed, nothing is copied, and processes share its pages. A
mapped file is decoded from as fast as memory of large pages, and is there in a fraction of the
time that reading takes (docs/measurements.md has the figures).

A note beside the file holds its size, its time of modification and a checksum of each tensor. A
file that has been touched or moved since is read whole and held against the checksums, once; one
that does not agree is prepared anew. Not here: the load graph (`fxlm.compiler.step`), which weights
there are (the artifact), files that nobody touched (`integrity`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from fxlm.compiler import key as keys
from fxlm.compiler.artifact import Artifact, TensorSpec, dtype_name, dtype_of, locked
from fxlm.compiler.errors import InvalidModel
from fxlm.compiler.step import WINDOW_BYTES, load_weights
from fxlm.models.checkpoint import Checkpoint
from fxlm.models.safetensors_file import TORCH_NAMES, SafetensorsFile
from fxlm.runtime.integrity import note_file
from fxlm.runtime.options import PreparedWeights

_log = logging.getLogger(__name__)

SMALLEST_BYTES = 64 << 20  # below that, preparing takes no time worth saving
DISK_SHARE = 0.25  # of a disk: what the files of all models may take
FREE_SHARE = 0.1  # of a disk: what stays free
ALIGNMENT = 64  # bytes; a cache line, and the widest load of the kernels
_SAFETENSORS = {torch_name: name for name, torch_name in TORCH_NAMES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where the prepared weights of an artifact and a checkpoint lie, or belong.

    Attributes:
        path: the file; None if they are not kept.
        reason: why there is one, or none.
    """

    path: Path | None
    reason: str


def place_of(
    artifact: Artifact, checkpoint: Checkpoint, folder: Path, choice: PreparedWeights = "auto",
) -> Place:  # fmt: skip
    """Where this model's prepared weights are kept.

    Args:
        artifact, checkpoint: of the model.
        folder: of the files of all models; need not exist.
        choice: ``off`` keeps none.
    """
    specs = artifact.weights()
    if choice == "off":
        return Place(path=None, reason="--prepared-weights off")
    if artifact.manifest["model"]["device"] != "cpu":
        return Place(path=None, reason="they are copied to the device anyway")
    if not any(line[0] == "op" for line in artifact.read_json("load.json")["graph"]):
        return Place(path=None, reason="the checkpoint's tensors serve as they are")
    total = sum(spec.nbytes for spec in specs.values())
    if total < SMALLEST_BYTES:
        return Place(path=None, reason=f"{total >> 20} MiB are prepared in no time")
    odd = [n for n, s in specs.items() if s.dtype not in _SAFETENSORS or _order(s) is None]
    if odd:
        return Place(path=None, reason=f"{odd[0]} has a layout that a file cannot hold")
    return Place(path=folder / f"{_digest(artifact, checkpoint)}.safetensors", reason="")


def _digest(artifact: Artifact, checkpoint: Checkpoint) -> str:
    """Identity of prepared weights: what they are made from, and how."""
    files = artifact.manifest["files"]
    how = [files[name]["sha256"] for name in ("load.json", "constants.safetensors")]
    stamps = [
        [path.name, path.stat().st_mtime_ns]
        for path in sorted({info.file for info in checkpoint.tensors.values()})
    ]
    specs = artifact.manifest["weights"]
    return keys.digest([checkpoint.weights_digest(), stamps, how, specs, _ops_digest()])[:32]


@cache
def _ops_digest() -> str:
    return keys.source_digest("compiler/ops")


def open_prepared(path: Path, specs: Mapping[str, TensorSpec]) -> dict[str, torch.Tensor] | None:
    """The weights, mapped; None if there is no such file, or it is not whole."""
    try:
        if not path.exists():
            return None
        file = SafetensorsFile(path)
        found = {name: _read(file, name, spec) for name, spec in specs.items()}
        _verify(file)
    except (InvalidModel, KeyError, ValueError, OSError) as error:
        _log.warning("prepared weights %s are damaged (%s): prepared anew", path, error)
        return None
    with contextlib.suppress(OSError):  # a share that is read-only
        # The longest unused goes first; the time of modification stays that of the note.
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    return found


def _verify(file: SafetensorsFile) -> None:
    """Hold a file against its note.

    Raises:
        ValueError, OSError: there is no note, or the file is not what was written.
    """
    note = json.loads(note_file(file.path).read_text())
    if not isinstance(note, dict) or not {"stamp", "crc32"} <= set(note):
        raise ValueError("its note is damaged")
    if note["stamp"] == _stamp(file.path):
        return
    for name in file.tensors:
        if zlib.crc32(_bytes(file.read(name).reshape(-1))) != note["crc32"].get(name):
            raise ValueError(f"{name} does not have its checksum")
        file.forget()
    with contextlib.suppress(OSError):  # it was copied or moved, and is whole
        _write_note(file.path, {**note, "stamp": _stamp(file.path)})


def _stamp(path: Path) -> list[int]:
    """Size in bytes and time of modification in nanoseconds: a file written to has another."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _write_note(path: Path, note: Mapping[str, object]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".note.", delete=False) as file:
        json.dump(note, file)
    os.chmod(file.name, 0o644)
    os.replace(file.name, note_file(path))


def _bytes(flat: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor [N]."""
    return memoryview(flat.view(torch.uint8).numpy().data)


def _read(file: SafetensorsFile, name: str, spec: TensorSpec) -> torch.Tensor:
    order = _order(spec)
    value = file.read(name)
    expected = [spec.shape[d] for d in order or ()]
    if list(value.shape) != expected or dtype_name(value.dtype) != spec.dtype:
        raise ValueError(f"{name} is {value.dtype} {list(value.shape)}")
    back = [0] * len(expected)
    for position, dim in enumerate(order or ()):
        back[dim] = position
    return value.permute(back)


def _order(spec: TensorSpec) -> list[int] | None:
    """Dimensions from the outermost in memory to the innermost; None if there are holes."""
    order = sorted(range(len(spec.shape)), key=lambda d: -spec.stride[d])
    expected = 1
    for dim in reversed(order):
        if spec.shape[dim] > 1 and spec.stride[dim] != expected:
            return None
        expected *= spec.shape[dim]
    return order


def load(
    artifact: Artifact, checkpoint: Checkpoint, device: torch.device, folder: Path,
    choice: PreparedWeights = "auto",
) -> tuple[dict[str, torch.Tensor], str]:  # fmt: skip
    """Prepared weights of a model: mapped if they are kept, else made, and kept if they may be.

    Returns:
        Weights by name, and where they come from, in words.
    """
    place = place_of(artifact, checkpoint, folder, choice)
    specs = artifact.weights()
    if place.path is None:
        return load_weights(artifact, checkpoint, device), f"prepared in memory: {place.reason}"
    found = open_prepared(place.path, specs)
    if found is not None:
        return found, f"mapped from {place.path}"
    reason = _keep(artifact, checkpoint, place.path)
    found = open_prepared(place.path, specs)
    if found is not None:
        return found, f"prepared, and kept in {place.path}"
    return load_weights(artifact, checkpoint, device), f"prepared in memory: {reason}"


def _keep(artifact: Artifact, checkpoint: Checkpoint, path: Path) -> str:
    """Prepare the weights into their file, one process at a time; why not, or nothing."""
    specs = artifact.weights()
    reason = make_room(path.parent, sum(spec.nbytes for spec in specs.values()))
    if reason:
        return reason
    try:
        with locked(path):
            if open_prepared(path, specs) is None:
                with Writer(path, specs) as writer:
                    load_weights(artifact, checkpoint, torch.device("cpu"), sink=writer.put)
    except OSError as error:
        return f"{path.parent}: {error.strerror}"
    return ""


# ---- writing ---------------------------------------------------------------------------------


class Writer:
    """Writes prepared weights to their file as they are made; use as a context.

    Args:
        path: of the file; it appears when the block ends without an error.
        specs: of all weights.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self._path = path
        self._specs = specs
        self._checksums: dict[str, int] = {}
        header, self._begins = _layout(specs)
        self._file = tempfile.NamedTemporaryFile(  # noqa: SIM115  closed by __exit__
            dir=path.parent, prefix=f".{path.stem}.", delete=False
        )
        self._file.write(header)
        self._file.flush()

    def put(self, name: str, value: torch.Tensor) -> None:
        """Write one weight; any order."""
        order = _order(self._specs[name])
        assert order is not None, self._specs[name]
        data = _bytes(value.permute(order).contiguous().view(-1))
        self._checksums[name] = zlib.crc32(data)
        begin = self._begins[name]
        for start in range(0, len(data), WINDOW_BYTES):
            _write_all(self._file.fileno(), data[start : start + WINDOW_BYTES], begin + start)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._file.close()
        if kind is None:
            os.chmod(self._file.name, 0o644)
            note = {"stamp": _stamp(Path(self._file.name)), "crc32": self._checksums}
            os.replace(self._file.name, self._path)
            _write_note(self._path, note)
        else:
            os.unlink(self._file.name)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def _layout(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """Header of the file and the first byte of each tensor.

    The format allows no holes between tensors, so those whose size keeps the next one aligned
    come first, and the header is filled up with spaces.
    """
    names = sorted(specs, key=lambda n: (specs[n].nbytes % ALIGNMENT != 0,
                                         -dtype_of(specs[n].dtype).itemsize))  # fmt: skip
    entries: dict[str, object] = {}
    position = 0
    for name in names:
        spec = specs[name]
        shape = [spec.shape[d] for d in _order(spec) or ()]
        end = position + spec.nbytes
        kind = _SAFETENSORS[spec.dtype]
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    begins = {n: len(text) + 8 + e["data_offsets"][0] for n, e in entries.items()}  # type: ignore[index]
    return len(text).to_bytes(8, "little") + text, begins


def make_room(folder: Path, nbytes: int) -> str:
    """Let go of the files unused for longest until ``nbytes`` more may be written.

    Returns:
        Why they may not; empty if they may.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror})"
    disk = shutil.disk_usage(folder)
    if nbytes > DISK_SHARE * disk.total:
        return f"{nbytes >> 20} MiB are more than {DISK_SHARE:.0%} of the disk of {folder}"
    files = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_atime)
    taken = sum(path.stat().st_size for path in files)
    while files and taken + nbytes > DISK_SHARE * disk.total:
        oldest = files.pop(0)
        taken -= oldest.stat().st_size
        oldest.unlink(missing_ok=True)  # who has it mapped keeps it
        note_file(oldest).unlink(missing_ok=True)
    if shutil.disk_usage(folder).free - nbytes < FREE_SHARE * disk.total:
        return f"less than {FREE_SHARE:.0%} of the disk of {folder} would stay free"
    return ""
