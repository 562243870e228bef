"""One safetensors file: its header checked to the last byte, its tensors mapped, never copied.

Format: https://huggingface.co/docs/safetensors (8 bytes length, little endian; JSON header;
data). Read here rather than by the library, as the error must name file and tensor, and as a
tensor must be a view of the mapping. Not here: which files make a checkpoint
(`fxlm.models.checkpoint`).
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxlm.compiler.errors import InvalidModel

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100 << 20  # the library's own bound
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2,
    "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "I16": "int16", "U16": "uint16",
    "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32",
    "I64": "int64", "U64": "uint64", "F64": "float64", "C64": "complex64",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        name: raw name in the file.
        dtype: safetensors spelling, e.g. ``BF16``.
        shape: of the tensor.
        file: the safetensors file.
        begin: first byte in the file (absolute).
        end: one past the last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype = getattr(torch, TORCH_NAMES[self.dtype])
        assert isinstance(dtype, torch.dtype), self.dtype
        return dtype


class SafetensorsFile:
    """An open file: its tensors by name, and views of them."""

    def __init__(self, path: Path) -> None:
        """Read and check the header.

        Raises:
            InvalidModel: not a safetensors file, truncated, or a tensor outside of it.
        """
        self.path = path
        try:
            self.num_bytes = path.stat().st_size
            with path.open("rb") as file:
                header = _read_header(path, file.read(8), self.num_bytes, file.read)
        except OSError as error:
            raise InvalidModel(f"{path} cannot be read: {error.strerror}") from error
        self.header_digest = hashlib.sha256(header).hexdigest()
        self.tensors = _tensors(path, header, self.num_bytes)
        self._map: mmap.mmap | None = None

    def _mapping(self) -> mmap.mmap:
        if self._map is None:
            with self.path.open("rb") as file:
                # Private and writable: torch warns of read-only memory. Nobody writes to it.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._map

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor as a view of the mapped file (CPU)."""
        import torch

        info = self.tensors[name]
        if info.begin == info.end:
            return torch.empty(info.shape, dtype=info.torch_dtype)
        count = math.prod(info.shape)
        if info.begin % ITEM_BYTES[info.dtype]:  # a writer that does not align: copy this one
            data = bytearray(self._mapping()[info.begin : info.end])
            return torch.frombuffer(data, dtype=info.torch_dtype).view(info.shape)
        flat = torch.frombuffer(
            self._mapping(), dtype=info.torch_dtype, count=count, offset=info.begin
        )
        return flat.view(info.shape)

    def forget(self) -> None:
        """Let the pages read so far go from this process; views stay valid and read them anew."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)  # nobody wrote to them: nothing is lost

    def sample_digest(self, samples: int = 16, sample_bytes: int = 4096) -> str:
        """Hash size, header and evenly spaced pages: the identity of the weights, cheaply."""
        digest = hashlib.sha256(f"{self.num_bytes}:{self.header_digest}".encode())
        with self.path.open("rb") as file:
            for index in range(samples):
                file.seek(self.num_bytes * (index + 1) // (samples + 1))
                digest.update(file.read(sample_bytes))
        return digest.hexdigest()


def _read_header(path: Path, prefix: bytes, num_bytes: int, read: Any) -> bytes:
    if len(prefix) < 8:
        raise InvalidModel(f"{path} is truncated: {num_bytes} bytes are no safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise InvalidModel(f"{path} is no safetensors file: its header claims {length} bytes")
    if length + 8 > num_bytes:
        raise InvalidModel(
            f"{path} is truncated: a header of {length} bytes in a file of {num_bytes}; "
            "download it again"
        )
    header: bytes = read(length)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _tensors(path: Path, header: bytes, num_bytes: int) -> dict[str, TensorInfo]:
    try:
        entries = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InvalidModel(f"the header of {path} is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise InvalidModel(f"the header of {path} is not a JSON object")
    data = 8 + len(header)
    tensors = {
        name: _tensor(path, name, entry, data, num_bytes)
        for name, entry in entries.items()
        if name != "__metadata__"
    }
    _refuse_overlap(path, tensors)
    return tensors


def _tensor(path: Path, name: str, entry: Any, data: int, num_bytes: int) -> TensorInfo:
    where = f"tensor {name!r} of {path}"
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidModel(f"{where} has no dtype, shape and data_offsets") from error
    if dtype not in ITEM_BYTES:
        raise InvalidModel(f"{where} has dtype {dtype!r}, which is not one of {list(ITEM_BYTES)}")
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise InvalidModel(f"{where} has shape {shape!r} and offsets {(begin, end)!r}")
    wanted = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != wanted:
        raise InvalidModel(
            f"{where}: {dtype} {shape} takes {wanted} bytes, but its offsets {begin}..{end} span "
            f"{end - begin}"
        )
    if data + end > num_bytes:
        raise InvalidModel(
            f"{where} ends at byte {data + end}, but the file has {num_bytes}: it is truncated; "
            "download it again"
        )
    return TensorInfo(
        name=name, dtype=dtype, shape=tuple(shape), file=path, begin=data + begin, end=data + end
    )


def _refuse_overlap(path: Path, tensors: dict[str, TensorInfo]) -> None:
    last: TensorInfo | None = None
    for info in sorted(tensors.values(), key=lambda t: (t.begin, t.end)):
        if info.begin == info.end:
            continue
        if last is not None and info.begin < last.end:
            raise InvalidModel(f"tensors {last.name!r} and {info.name!r} of {path} overlap")
        last = info
