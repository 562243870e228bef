"""Quantized weights in PyTorch: canonical form, packed form, linear layers over them."""

from __future__ import annotations

import pytest
import torch

from fxlm.compiler import ops
from fxlm.compiler.ops import quantized as q

ops.load()
fxlm = torch.ops.fxlm


def weight(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def plain(weight: torch.Tensor, bits: int, group: int, symmetric: bool) -> torch.Tensor:
    """Quantize and dequantize one group at a time, by the textbook."""
    out = torch.empty_like(weight)
    size, low, high = group or weight.shape[1], -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for row in range(weight.shape[0]):
        for begin in range(0, weight.shape[1], size):
            part = weight[row, begin : begin + size]
            if symmetric:
                scale, zero = float(part.abs().max()) / high, 0
            else:
                least, most = min(float(part.min()), 0.0), max(float(part.max()), 0.0)
                scale = (most - least) / (high - low)
                zero = round(low - least / scale)
            codes = (part / scale + zero).round().clamp(low, high)
            out[row, begin : begin + size] = (codes - zero) * scale
    return out


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 16, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_round_to_the_nearest_level(bits: int, group: int, symmetric: bool) -> None:
    dense = weight(5, 72)  # the last group is shorter
    codes, scale, offset = fxlm.quantize_int(dense, bits, group, symmetric)
    assert int(codes.min()) >= -(2 ** (bits - 1))
    assert int(codes.max()) < 2 ** (bits - 1)
    args = (None if symmetric else offset, None, bits, [1, group], torch.float32, "none")
    found = fxlm.dequantize(codes, scale, *args)
    torch.testing.assert_close(found, plain(dense, bits, group, symmetric), rtol=0, atol=1e-5)


def test_a_row_of_zeros_stays_zero() -> None:
    for symmetric in (True, False):
        codes, scale, offset = fxlm.quantize_int(torch.zeros(2, 32), 4, 16, symmetric)
        args = (offset, None, 4, [1, 16], torch.float32, "none")
        assert not fxlm.dequantize(codes, scale, *args).any()


@pytest.mark.parametrize("block", [[0, 0], [1, 0], [4, 16]])
def test_fp8_errs_by_half_a_unit_of_its_three_bits(block: list[int]) -> None:
    dense = weight(10, 40)
    codes, scale = fxlm.quantize_fp8(dense, block)
    assert list(scale.shape) == [-(-s // (b or s)) for s, b in zip(dense.shape, block, strict=True)]
    found = fxlm.dequantize(codes, scale, None, None, 8, block, torch.float32, "none")
    normal = dense.abs() > 0.01  # below lie subnormals of small blocks
    assert float(((found - dense) / dense)[normal].abs().max()) <= 2.0**-4


def test_a_code_book_is_looked_up() -> None:
    codes = torch.arange(16, dtype=torch.int8)[None]
    table = fxlm.code_book(codes, "nf4")
    args = (None, table, 4, [1, 0], torch.float32, "none")
    found = fxlm.dequantize(codes, torch.tensor([[2.0]]), *args)
    torch.testing.assert_close(found[0], 2 * torch.tensor(q.CODE_BOOKS["nf4"]))


def test_leading_dimensions_are_kept() -> None:
    codes = torch.randint(-8, 8, (3, 4, 32), dtype=torch.int8)
    scale, offset = torch.rand(3, 2, 2), torch.rand(3, 2, 2)
    args = (None, 4, [2, 16], torch.float32, "none")
    found = fxlm.dequantize(codes, scale, offset, *args)
    for i in range(3):
        torch.testing.assert_close(
            found[i], fxlm.dequantize(codes[i], scale[i], offset[i], *args), rtol=0, atol=0
        )


def test_large_weights_are_widened_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = weight(9, 64)
    whole = fxlm.quantize_int(dense, 8, 32, False)
    args = (None, 8, [1, 32], torch.bfloat16, "none")
    expected = fxlm.dequantize(whole[0], whole[1], whole[2], *args)
    monkeypatch.setattr(q, "TILE", 128)
    tiled = fxlm.quantize_int(dense, 8, 32, False)
    assert all(torch.equal(a, b) for a, b in zip(whole, tiled, strict=True))
    assert torch.equal(fxlm.dequantize(*tiled, *args), expected)


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (70, 37), (1, 1)])
@pytest.mark.parametrize("kind", ["int8", "int4", "table", "fp8"])
def test_packing_loses_nothing(kind: str, outputs: int, inputs: int) -> None:
    bits = 4 if kind in ("int4", "table") else 8
    low, high = (0, 16) if kind == "table" else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    codes = torch.randint(low, high, (outputs, inputs)).to(torch.int8)
    codes = codes.float().to(torch.float8_e4m3fn) if kind == "fp8" else codes
    packed = fxlm.pack_codes(codes, bits, kind == "table")
    assert packed.shape == (-(-outputs // 64), -(-inputs // (4 if bits == 8 else 8)), 64, 4)
    found = q.unpack_codes(packed, outputs, inputs, bits, kind == "table")
    assert torch.equal(found.view(torch.int8), codes.view(torch.int8))


def test_a_four_bit_step_is_two_eight_bit_steps() -> None:
    codes = torch.randint(-8, 8, (64, 16), dtype=torch.int8)
    small, large = fxlm.pack_codes(codes, 4, False), fxlm.pack_codes(codes, 8, False)
    assert torch.equal((small & 15).view(torch.int8) - 8, large[:, 0::2])
    assert torch.equal((small >> 4).view(torch.int8) - 8, large[:, 1::2])


CASES = {  # bits, block, offset, table, fp8
    "int8": (8, (1, 0), False, False, False),
    "int8 in groups": (8, (1, 16), True, False, False),
    "int4": (4, (1, 32), True, False, False),
    "int4 symmetric": (4, (1, 16), False, False, False),
    "nf4": (4, (1, 16), False, True, False),
    "fp8": (8, (0, 0), False, False, True),
    "fp8 in blocks": (8, (16, 16), False, False, True),
}


def made(
    name: str, outputs: int, inputs: int
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], int]:
    """A random weight: dense in float32, packed, and its group."""
    bits, block, has_offset, has_table, fp8 = CASES[name]
    low, high = (0, 16) if has_table else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    codes = torch.randint(low, high, (outputs, inputs)).to(torch.int8)
    codes = codes.float().to(torch.float8_e4m3fn) if fp8 else codes
    groups = [-(-s // (b or s)) for s, b in zip((outputs, inputs), block, strict=True)]
    scale = torch.rand(groups) + 0.1
    offset = torch.randn(groups) if has_offset else None
    table = fxlm.code_book(codes, "nf4") if has_table else None
    dense = fxlm.dequantize(codes, scale, offset, table, bits, block, torch.float32, "none")
    packed = fxlm.pack_codes(codes, bits, has_table)
    scales = [s if s is None else fxlm.pack_scale(s, outputs, block[0]) for s in (scale, offset)]
    return dense, (packed, *scales, table), block[1]


@pytest.mark.parametrize("name", CASES)
def test_linear_equals_the_dequantized_one(name: str) -> None:
    torch.manual_seed(0)
    dense, packed, group = made(name, 70, 48)
    x, bias = torch.randn(2, 3, 48), torch.randn(70)
    found = fxlm.quantized_linear(x, *packed, bias, 70, CASES[name][0], group, "none")
    expected = torch.nn.functional.linear(x, dense, bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_rows_equal_the_dequantized_ones(name: str) -> None:
    torch.manual_seed(0)
    dense, packed, group = made(name, 70, 48)
    ids = torch.tensor([[3, 69, 64], [0, 3, 63]])
    found = fxlm.quantized_rows(*packed, ids, 48, CASES[name][0], group, torch.float32)
    torch.testing.assert_close(found, dense[ids], rtol=0, atol=0)


def test_inputs_are_rounded_per_token() -> None:
    torch.manual_seed(0)
    dense, packed, group = made("int8", 70, 48)
    x = torch.randn(4, 48) * torch.tensor([[1e-3], [1.0], [1e3], [0.0]])
    found = fxlm.quantized_linear(x, *packed, None, 70, 8, group, "int8")
    step = x.abs().amax(-1, keepdim=True) / 127
    rounded = torch.where(step > 0, torch.round(x / step) * step, 0.0)
    expected = rounded @ dense.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert float((found[1] - x[1] @ dense.T).abs().max()) > 1e-3  # it does round


def test_fakes_have_the_shapes_of_results() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    _, packed, group = made("int4", 70, 48)
    x = torch.randn(2, 48)
    calls = [
        (fxlm.quantize_int, (weight(70, 48), 4, 32, False)),
        (fxlm.quantize_fp8, (weight(70, 48), [32, 32])),
        (fxlm.quantized_linear, (x, *packed, None, 70, 4, group, "none")),
        (fxlm.quantized_rows, (*packed, torch.tensor([1, 2]), 48, 4, group, torch.bfloat16)),
        (fxlm.pack_scale, (torch.rand(3, 2), 70, 32)),
        (fxlm.pack_codes, (torch.zeros(70, 48, dtype=torch.int8), 4, False)),
    ]
    for op, args in calls:
        real = op(*args)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = op(*args)
        pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
        for a, b in pairs:
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), op
