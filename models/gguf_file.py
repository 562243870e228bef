"""One GGUF file: its header checked to the last byte, its tensors mapped, never copied.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A header of typed keys and
values, a table of tensors, then aligned data. Sizes of a tensor are stored innermost first; here
they are given outermost first, as PyTorch has them. A quantized tensor is given as bytes,
[..., N, bytes of a row]; what these mean is `fxlm.models.formats.gguf`'s. Not here: names.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxlm.compiler.errors import InvalidModel

if TYPE_CHECKING:
    import torch

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ITEMS = 1 << 24  # keys, tensors, or elements of an array
MAX_DEPTH = 8  # of arrays in arrays; writers of today have none
# Types of values: struct format, or a name.
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
# Tensor types: name, values a block, bytes a block.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}  # fmt: skip
DENSE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """Where a tensor lies; the fields are those of a safetensors tensor.

    Attributes:
        name: raw name in the file.
        dtype: the file's own type, e.g. ``F16`` or ``Q4_K``.
        shape: as read: of a quantized tensor the last size is the bytes of a row.
        dense_shape: of the values.
        file, begin, end: bytes [begin, end) of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    dense_shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype = getattr(torch, DENSE.get(self.dtype, "uint8"))
        assert isinstance(dtype, torch.dtype), self.dtype
        return dtype


class GgufFile:
    """An open file: its values and tensors by name, and views of the tensors."""

    def __init__(self, path: Path) -> None:
        """Read and check the header.

        Raises:
            InvalidModel: no GGUF file, truncated, of an unknown version or tensor type.
        """
        self.path = path
        try:
            self.num_bytes = path.stat().st_size
            if self.num_bytes < len(MAGIC):
                raise InvalidModel(f"{path} is no GGUF file: it has {self.num_bytes} bytes")
            with path.open("rb") as file:
                # Private and writable: torch warns of read-only memory. Nobody writes to it.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise InvalidModel(f"{path} cannot be read: {error.strerror}") from error
        header = _Header(path, self._map)
        self.values, self.tensors = header.read()
        self.header_digest = hashlib.sha256(self._map[: header.place]).hexdigest()

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor as a view of the mapped file (CPU)."""
        import torch

        info = self.tensors[name]
        count = math.prod(info.shape)
        flat = torch.frombuffer(self._map, dtype=info.torch_dtype, count=count, offset=info.begin)
        return flat.view(info.shape)

    def forget(self) -> None:
        """Let the pages read so far go from this process; views stay valid and read them anew."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)  # nobody wrote to them: nothing is lost

    def sample_digest(self, samples: int = 16, sample_bytes: int = 4096) -> str:
        """Hash size, header and evenly spaced pages: the identity of the weights, cheaply."""
        digest = hashlib.sha256(f"{self.num_bytes}:{self.header_digest}".encode())
        for index in range(samples):
            begin = self.num_bytes * (index + 1) // (samples + 1)
            digest.update(self._map[begin : begin + sample_bytes])
        return digest.hexdigest()


def _require_contiguous(
    path: Path, tensors: dict[str, GgufTensor], data: int, alignment: int
) -> None:
    """Each tensor must begin where the one before ends, padded: else a type or offset is wrong."""
    before, place = "the header", data
    for info in sorted(tensors.values(), key=lambda t: (t.begin, t.end)):
        if info.begin != place:
            raise InvalidModel(
                f"tensor {info.name!r} of {path} begins at byte {info.begin}, but {before} ends at "
                f"{place} (padded): a type or an offset in the header is wrong; download it again"
            )
        before, place = f"{info.name!r} ({info.dtype})", -(-info.end // alignment) * alignment


class _Header:
    """Reads a header from its start; ``place`` is the next byte."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.place = path, data, 0

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        """Values and tensors."""
        if self.data[:4] != MAGIC:
            raise InvalidModel(f"{self.path} is no GGUF file: it begins with {self.data[:4]!r}")
        self.place = 4
        (version,) = self.unpack("I")
        if version not in VERSIONS:
            raise InvalidModel(f"{self.path} is GGUF version {version}; {VERSIONS} are read")
        num_tensors, num_values = self.count("Q"), self.count("Q")
        values = {}
        for _ in range(num_values):
            name = self.string()
            (kind,) = self.unpack("I")
            values[name] = self.value(kind)
        entries = [self.entry() for _ in range(num_tensors)]
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment % 8:
            raise InvalidModel(
                f"{self.path} has general.alignment {alignment!r}, must be a multiple of 8; "
                "download it again"
            )
        data = -(-self.place // alignment) * alignment
        tensors = {entry[0]: self.tensor(*entry, data) for entry in entries}
        if len(tensors) != num_tensors:
            raise InvalidModel(f"{self.path} has two tensors of one name")
        _require_contiguous(self.path, tensors, data, alignment)
        return values, tensors

    def unpack(self, form: str, count: int = 1) -> tuple[Any, ...]:
        """``count`` numbers."""
        full = f"<{count}{form}"
        end = self.place + struct.calcsize(full)
        if end > len(self.data):
            raise InvalidModel(
                f"{self.path} is truncated: its header goes beyond the {len(self.data)} bytes; "
                "download it again"
            )
        found = struct.unpack_from(full, self.data, self.place)
        self.place = end
        return found

    def count(self, form: str) -> int:
        """A number of items, of which there cannot be absurdly many."""
        (number,) = self.unpack(form)
        if number > MAX_ITEMS:
            raise InvalidModel(f"the header of {self.path} is damaged: it claims {number} items")
        return int(number)

    def string(self) -> str:
        """Length and UTF-8; what is no UTF-8 (of tokens) is kept as surrogates."""
        (length,) = self.unpack("Q")
        begin, end = self.place, self.place + length
        if end > len(self.data):
            raise InvalidModel(f"{self.path} is truncated: a text of {length} bytes in its header")
        self.place = end
        return self.data[begin:end].decode("utf-8", "surrogateescape")

    def value(self, kind: int, depth: int = 0) -> Any:
        """One value of a type, in so many arrays."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            (inner,) = self.unpack("I")
            count = self.count("Q")
            if depth > MAX_DEPTH:
                raise InvalidModel(f"the header of {self.path} is damaged: arrays in arrays")
            if inner in SCALARS:
                return list(self.unpack(SCALARS[inner], count))
            return [self.value(inner, depth + 1) for _ in range(count)]
        if kind not in SCALARS:
            raise InvalidModel(f"the header of {self.path} has a value of unknown type {kind}")
        return self.unpack(SCALARS[kind])[0]

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, sizes (outermost first), type and offset of a tensor."""
        name = self.string()
        (dimensions,) = self.unpack("I")
        if dimensions > 4:
            raise InvalidModel(f"tensor {name!r} of {self.path} has {dimensions} dimensions")
        sizes = tuple(int(s) for s in reversed(self.unpack("Q", dimensions)))
        (kind,) = self.unpack("I")
        (offset,) = self.unpack("Q")
        return name, sizes, kind, offset

    def tensor(
        self, name: str, sizes: tuple[int, ...], kind: int, offset: int, data: int
    ) -> GgufTensor:
        """The tensor, checked to lie in the file."""
        where = f"tensor {name!r} of {self.path}"
        if kind not in TYPES:
            known = ", ".join(t[0] for t in TYPES.values())
            raise InvalidModel(f"{where} has ggml type {kind}, which is not read; read are {known}")
        if 0 in sizes:
            raise InvalidModel(f"{where} has sizes {list(sizes)}: it is empty; download it again")
        label, block, width = TYPES[kind]
        if block > 1 and (not sizes or sizes[-1] % block):
            raise InvalidModel(f"{where} is {label} with rows of {sizes[-1:]}, not of {block}s")
        shape = sizes if label in DENSE else (*sizes[:-1], sizes[-1] // block * width)
        begin = data + offset
        end = begin + math.prod(sizes) // block * width
        if end > len(self.data):
            raise InvalidModel(
                f"{where} ends at byte {end}, but the file has {len(self.data)}: it is truncated; "
                "download it again"
            )
        if begin % 4:
            raise InvalidModel(f"{where} begins at byte {begin}, which is not aligned")
        return GgufTensor(
            name=name, dtype=label, shape=shape, dense_shape=sizes, file=self.path, begin=begin,
            end=end,
        )  # fmt: skip
