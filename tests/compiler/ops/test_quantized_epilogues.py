"""What a quantized layer does to its sums before rounding them: functions and gates.

The layers themselves are tested in test_quantized_kernels.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from fxlm.compiler.ops import quantized
from fxlm.compiler.ops.epilogue import EPILOGUES, FUNCTIONS

OPS = torch.ops.fxlm
# sums and the function in float32; otherwise the rounding of the result, and of x to 16 bits
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
ROWS = (1, 3, 17, 64)
SHAPES = ((256, 64), (134, 300), (6, 7))
GROUP = {8: 0, 4: 32}  # bits -> inputs that share a scale


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight_of(
    bits: int, outputs: int, inputs: int, gated: bool, activation: str = "none"
) -> tuple[Tensor, tuple[object, ...]]:
    """A weight in float64, and what the op takes behind x; the bias of the latter is ``None``."""
    codes, scale, offset = OPS.quantize_int(
        normal(outputs, inputs, seed=1) * inputs**-0.5, bits, GROUP[bits], False
    )
    dense = OPS.dequantize(
        codes, scale, offset, None, bits, [1, GROUP[bits]], torch.float64, "none"
    )
    scales = [OPS.pack_scale(part, outputs, 1, gated) for part in (scale, offset)]
    packed = (OPS.pack_codes(codes, bits, False, gated), *scales, None)
    return dense, (*packed, None, outputs, bits, GROUP[bits], activation)


def exact(y: Tensor, epilogue: str) -> Tensor:
    """The epilogue of y, in y's type."""
    if epilogue == "none":
        return y
    function = FUNCTIONS[epilogue.removesuffix("_and_mul")]
    if not epilogue.endswith("_and_mul"):
        return function(y)
    gate, up = y.chunk(2, -1)
    return function(gate) * up


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_kernel_equals_float64(epilogue: str, bits: int) -> None:
    for shape in SHAPES:
        dense, rest = weight_of(bits, *shape, epilogue.endswith("_and_mul"))
        for dtype, tolerance in TOLERANCE.items():
            bias = normal(shape[0], dtype=dtype, seed=3)
            for rows in ROWS:
                x = normal(rows, shape[1], dtype=dtype, seed=rows)
                want = exact(linear(x.double(), dense, bias.double()), epilogue)
                found = OPS.quantized_linear(x, *rest[:4], bias, *rest[5:], epilogue)
                assert found.shape == want.shape
                assert found.is_contiguous()
                error = (found.double() - want).abs() / (1 + want.abs())
                assert float(error.max()) < tolerance, (shape, rows, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_kernel_equals_its_reference(epilogue: str, dtype: torch.dtype) -> None:
    _, rest = weight_of(8, 134, 64, epilogue.endswith("_and_mul"), "int8")
    x = normal(2, 3, 64, dtype=dtype)
    found = OPS.quantized_linear(x, *rest, epilogue)
    want = OPS.quantized_linear_reference(x, *rest, epilogue)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("epilogue", FUNCTIONS)
def test_kernel_knows_the_ends_of_a_function(epilogue: str) -> None:
    dense, rest = weight_of(8, 64, 64, False)
    for size in (1e-3, 1e1, 1e2, 1e3, 1e9, 1e30):
        x = normal(4, 64) * size
        want = exact(x.double() @ dense.T, epilogue)
        error = (OPS.quantized_linear(x, *rest, epilogue).double() - want).abs()
        assert float(error.max()) < 1e-5 * size, size


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_no_number_stays_none(epilogue: str) -> None:
    _, rest = weight_of(8, 64, 64, epilogue.endswith("_and_mul"))
    x = normal(3, 64)
    want = OPS.quantized_linear(x, *rest, epilogue)
    x[1, 5] = float("nan")
    found = OPS.quantized_linear(x, *rest, epilogue)
    assert found[1].isnan().all()
    assert torch.equal(found[::2], want[::2])


@pytest.mark.parametrize("epilogue", ["silu_and_mul", "gelu"])
def test_the_batch_changes_no_bit(epilogue: str) -> None:
    _, rest = weight_of(4, 134, 300, epilogue.endswith("_and_mul"))
    x = normal(130, 300, dtype=torch.bfloat16)
    whole = OPS.quantized_linear(x, *rest, epilogue)
    for begin, end in ((0, 1), (3, 5), (20, 43), (1, 130)):
        assert torch.equal(OPS.quantized_linear(x[begin:end], *rest, epilogue), whole[begin:end])


@pytest.mark.parametrize("outputs", [128, 134, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_kernel_packs_gate_and_up_side_by_side(bits: int, outputs: int) -> None:
    codes = torch.arange(outputs * 40).remainder(2**bits).sub(2 ** (bits - 1)).view(outputs, 40)
    codes = codes.to(torch.int8)
    packed = OPS.pack_codes(codes, bits, False, True)
    assert torch.equal(packed, OPS.pack_codes_reference(codes, bits, False, True))
    found = quantized.unpack_codes(packed, outputs, 40, bits, False, True)
    assert torch.equal(found, codes)


def test_a_panel_has_both_factors_of_32_products() -> None:
    codes = torch.arange(256).sub(128).to(torch.int8)[:, None].expand(256, 4).contiguous()
    packed = OPS.pack_codes(codes, 8, False, True)
    assert torch.equal(packed[1, 0, :32], codes[32:64])
    assert torch.equal(packed[1, 0, 32:], codes[128 + 32 : 128 + 64])


def test_what_does_not_fit_is_an_error(registered: str) -> None:
    if registered == "reference":
        pytest.skip("checked by the kernels")
    _, rest = weight_of(8, 63, 8, False)
    with pytest.raises(RuntimeError, match="63 outputs, an odd number"):
        OPS.quantized_linear(torch.ones(1, 8), *rest, "silu_and_mul")
    with pytest.raises(RuntimeError, match='epilogue is "swish"'):
        OPS.quantized_linear(torch.ones(1, 8), *rest, "swish")
    with pytest.raises(RuntimeError, match="63 outputs, an odd number"):
        OPS.pack_codes(torch.zeros(63, 8, dtype=torch.int8), 8, False, True)
