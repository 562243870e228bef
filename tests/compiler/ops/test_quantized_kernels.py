"""Kernels over quantized weights: against float64, layout, and no bit that depends on the batch.

The references are tested in test_quantized.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from fxlm.compiler.ops import quantized

OPS = torch.ops.fxlm
# float32 sums of float32 inputs; otherwise the rounding of the result, and of x to 16 bits
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
ROWS = (1, 3, 17, 511)
SHAPES = ((64, 64), (129, 700), (67, 1029), (3, 7))


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """How a weight is quantized; ``group`` 0: one scale for all inputs."""

    kind: str = "int"
    bits: int = 8
    group: int = 0
    rows: int = 1
    offset: bool = False
    activation: str = "none"


SCHEMES = {
    "int8": Scheme(activation="int8"),
    "int8 weights": Scheme(),
    "int8 in groups of 16": Scheme(group=16),
    "int8 in groups of 32": Scheme(group=32, activation="int8"),
    "int8 in groups of 128, offsets": Scheme(group=128, offset=True),
    "int8 in groups of 1024": Scheme(group=1024),
    "int4": Scheme(bits=4, group=32),
    "int4, offsets": Scheme(bits=4, group=32, offset=True),
    "int4 in groups of 128, offsets, int8 inputs": Scheme(
        bits=4, group=128, offset=True, activation="int8"
    ),
    "int4 per channel": Scheme(bits=4, activation="int8"),
    "nf4": Scheme(kind="nf4", bits=4, group=64),
    "fp4, int8 inputs": Scheme(kind="fp4", bits=4, group=32, offset=True, activation="int8"),
    "fp8": Scheme(kind="fp8"),
    "fp8 in blocks": Scheme(kind="fp8", group=128, rows=128),
    "fp8, int8 inputs": Scheme(kind="fp8", activation="int8"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """A quantized weight: what it stands for, and what the op takes."""

    scheme: Scheme
    dense: Tensor  # float64
    packed: tuple[Tensor, Tensor, Tensor | None, Tensor | None]

    def __call__(self, x: Tensor, bias: Tensor | None = None, *, twin: bool = False) -> Tensor:
        op = OPS.quantized_linear_reference if twin else OPS.quantized_linear
        rest = (self.scheme.bits, self.scheme.group, self.scheme.activation)
        found: Tensor = op(x, *self.packed, bias, self.dense.shape[0], *rest)
        return found

    def exact(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """In float64, with x rounded as the scheme says."""
        wide = x.double()
        if self.scheme.activation == "int8":
            codes, scale = quantized.round_rows(x.float())
            wide = codes.double() * scale.double()
        return linear(wide, self.dense, None if bias is None else bias.double())


def codes_of(scheme: Scheme, outputs: int, inputs: int) -> Tensor:
    """All codes that there are, NaN excepted."""
    generator = torch.Generator().manual_seed(1)
    if scheme.kind == "fp8":
        codes = torch.randint(-128, 128, (outputs, inputs), generator=generator).to(torch.int8)
        codes[(codes & 127) == 127] = 0
        return codes.view(torch.float8_e4m3fn)
    half = 2 ** (scheme.bits - 1)
    low, high = (-half, half) if scheme.kind == "int" else (0, 16)
    return torch.randint(low, high, (outputs, inputs), generator=generator).to(torch.int8)


def weight_of(name: str, outputs: int, inputs: int) -> Weight:
    scheme = SCHEMES[name]
    codes, block = codes_of(scheme, outputs, inputs), (scheme.rows, scheme.group)
    groups = [-(-s // (b or s)) for s, b in zip((outputs, inputs), block, strict=True)]
    generator = torch.Generator().manual_seed(2)
    size = inputs**-0.5 / float(codes.float().square().mean().sqrt())
    scale = (torch.rand(groups, generator=generator) + 0.5) * size
    offset = torch.randn(groups, generator=generator) * size if scheme.offset else None
    table = None if scheme.kind in ("int", "fp8") else OPS.code_book(codes, scheme.kind)
    spread = (
        (torch.arange(outputs) // scheme.rows)[:, None],
        torch.arange(inputs) // (scheme.group or inputs),
    )
    dense = codes.double() if table is None else table.double()[codes.int()]
    dense = dense * scale.double()[spread] + (0 if offset is None else offset.double()[spread])
    parts = [
        None if part is None else OPS.pack_scale(part, outputs, scheme.rows)
        for part in (scale, offset)
    ]
    packed = (OPS.pack_codes(codes, scheme.bits, table is not None), *parts, table)
    return Weight(scheme=scheme, dense=dense, packed=packed)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", SCHEMES)
def test_kernel_equals_float64(name: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight, bias = weight_of(name, *shape), normal(shape[0], dtype=dtype, seed=3)
        for rows in ROWS:
            x = normal(rows, shape[1], dtype=dtype, seed=rows)
            want = weight.exact(x, bias)
            error = (weight(x, bias).double() - want).abs() / (1 + want.abs())
            assert float(error.max()) < TOLERANCE[dtype], (shape, rows)


@pytest.mark.parametrize("name", SCHEMES)
def test_kernel_equals_its_reference(name: str) -> None:
    weight = weight_of(name, 129, 700)
    x = normal(5, 700, dtype=torch.float32)
    torch.testing.assert_close(weight(x), weight(x, twin=True), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_keeps_small_inputs_beside_a_large_one(bits: int, dtype: torch.dtype) -> None:
    """Fixed point: what an input loses is 2**-16 of its segment's largest; here that one is 100."""
    weight = weight_of("int4" if bits == 4 else "int8 weights", 64, 512)
    x = normal(4, 512, dtype=dtype)
    weight.dense[:, 7] = 0
    codes = quantized.unpack_codes(weight.packed[0], 64, 512, bits, False)
    codes[:, 7] = 0
    silent = replace(weight, packed=(OPS.pack_codes(codes, bits, False), *weight.packed[1:]))
    want = silent.exact(x)
    x[:, 7] = 100.0
    error = (silent(x).double() - want).abs()
    assert bool((error <= 100 * 2**-16 * 4 + torch.finfo(dtype).eps * want.abs()).all())


@pytest.mark.parametrize("name", SCHEMES)
def test_the_batch_changes_no_bit(name: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        weight, x = weight_of(name, 130, 1100), normal(511, 1100, dtype=dtype)
        bias = normal(130, dtype=dtype, seed=2)
        whole = weight(x, bias)
        for begin, end in ((0, 1), (510, 511), (3, 5), (4, 7), (7, 15), (20, 43), (1, 511)):
            assert torch.equal(weight(x[begin:end], bias), whole[begin:end])


@pytest.mark.parametrize("name", SCHEMES)
def test_threads_change_no_bit(name: str) -> None:
    weight = weight_of(name, 700, 300)
    for rows in (1, 8, 130):
        x = normal(rows, 300, dtype=torch.bfloat16)
        results = []
        for count in (1, 2, 5):
            with threads(count):
                results.append(weight(x))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["int8", "int4, offsets", "nf4"])
def test_strides_change_no_bit(name: str) -> None:
    weight, x = weight_of(name, 70, 41), normal(2, 5, 3, 41, dtype=torch.bfloat16)
    want = weight(x)
    assert want.shape == (2, 5, 3, 70)
    assert want.is_contiguous()
    assert torch.equal(weight(torch.stack([x, x], dim=-1)[..., 0]), want)
    assert torch.equal(weight(x.transpose(0, 1).contiguous().transpose(0, 1)), want)
    assert torch.equal(weight(x[1, 2, 1]), want[1, 2, 1])


@pytest.mark.parametrize("name", ["int8", "int8 weights", "int4, offsets", "nf4", "fp8"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_no_number_of_one_row_reaches_another(name: str, value: float) -> None:
    weight, x = weight_of(name, 65, 63), normal(8, 63, dtype=torch.bfloat16)
    want = weight(x)
    x[3, 5] = value
    found = weight(x)
    assert torch.equal(found[:3], want[:3])
    assert torch.equal(found[4:], want[4:])
    assert not found[3].isfinite().all()


def test_kernel_with_no_rows_and_with_zeros() -> None:
    weight = weight_of("int4", 70, 40)
    assert weight(torch.ones(2, 0, 40)).shape == (2, 0, 70)
    for name in SCHEMES:
        assert not weight_of(name, 70, 40)(torch.zeros(2, 40)).any()


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (70, 37), (200, 2100), (1, 1)])
@pytest.mark.parametrize("name", ["int8", "int4", "nf4", "fp8"])
def test_kernel_packs_as_the_layout_says(name: str, outputs: int, inputs: int) -> None:
    scheme = SCHEMES[name]
    codes = codes_of(scheme, outputs, inputs)
    want = OPS.pack_codes_reference(codes, scheme.bits, name == "nf4").view(torch.uint8)
    for given in (codes, torch.cat([codes.view(torch.int8)] * 2, 1).view(codes.dtype)[:, :inputs]):
        packed = OPS.pack_codes(given, scheme.bits, name == "nf4")
        assert torch.equal(packed.view(torch.uint8), want)


def test_groups_that_kernels_cannot_cut_go_to_the_reference() -> None:
    codes = torch.randint(-8, 8, (64, 30), dtype=torch.int8)
    scale = torch.rand(64, 3) + 0.5
    packed, scales = OPS.pack_codes(codes, 4, False), OPS.pack_scale(scale, 64, 1)
    x = normal(3, 30, dtype=torch.float32)
    found = OPS.quantized_linear(x, packed, scales, None, None, None, 64, 4, 10, "none")
    want = x @ (codes * scale.repeat_interleave(10, 1)).T
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_an_error(registered: str) -> None:
    if registered == "reference":
        pytest.skip("checked by the kernels")
    packed, scale, _, _ = weight_of("int8", 70, 8).packed
    x = torch.ones(1, 8)

    def call(x: Tensor, scale: Tensor, n: int, bias: Tensor | None, activation: str) -> None:
        OPS.quantized_linear(x, packed, scale, None, None, bias, n, 8, 0, activation)

    with pytest.raises(RuntimeError, match="as 70 outputs of 13 inputs"):
        call(torch.ones(1, 13), scale, 70, None, "none")
    with pytest.raises(RuntimeError, match="as 129 outputs"):
        call(x, scale, 129, None, "none")
    with pytest.raises(RuntimeError, match=r"scale is not \[2, 1, 64\]"):
        call(x, scale[:1].contiguous(), 70, None, "none")
    with pytest.raises(RuntimeError, match="bias is not"):
        call(x, scale, 70, torch.ones(69), "none")
    with pytest.raises(RuntimeError, match='activation is "int7"'):
        call(x, scale, 70, None, "int7")
