"""What a packed layer does to its sums before rounding them: functions and gates.

The layers themselves are tested in test_linear.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from fxlm.compiler.ops.epilogue import EPILOGUES, FUNCTIONS
from fxlm.compiler.ops.linear import unpack_weight
from tests.compiler.ops.test_linear import TOLERANCE, normal, threads, weight_of
from tests.compiler.ops.test_quantized_epilogues import exact

OPS = torch.ops.fxlm
ROWS = (1, 3, 17, 40, 133)  # few and many, a multiple of no tile
# whole panels, the last panel a line or less, smaller than a vector, whole lines of many blocks
SHAPES = ((256, 64), (134, 300), (6, 7), (200, 129), (128, 600))
GATES = [name for name in EPILOGUES if name.endswith("_and_mul")]


def packed_of(weight: Tensor, epilogue: str) -> Tensor:
    return OPS.pack_weight(weight, epilogue in GATES)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_kernel_equals_float64(epilogue: str, with_bias: bool, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight, n = weight_of(shape, dtype), shape[0]
        bias = normal(n, dtype=dtype, seed=2) if with_bias else None
        packed = packed_of(weight, epilogue)
        for rows in ROWS:
            x = normal(rows, shape[1], dtype=dtype, seed=rows)
            y = linear(x.double(), weight.double(), None if bias is None else bias.double())
            want = exact(y, epilogue)
            for op in (OPS.packed_linear, OPS.packed_linear_reference):
                found = op(x, packed, bias, n, epilogue)
                assert found.shape == want.shape
                assert found.dtype == dtype
                assert found.is_contiguous()
                error = (found.double() - want).abs() / (1 + want.abs())
                assert float(error.max()) < TOLERANCE[dtype], (shape, rows, op)


def test_float64_goes_to_the_reference() -> None:
    weight, x = weight_of((70, 41), torch.float64), normal(3, 41, dtype=torch.float64)
    for epilogue in EPILOGUES:
        found = OPS.packed_linear(x, packed_of(weight, epilogue), None, 70, epilogue)
        torch.testing.assert_close(found, exact(x @ weight.t(), epilogue), atol=1e-13, rtol=1e-13)


def test_an_epilogue_that_does_nothing_changes_no_bit() -> None:
    packed = OPS.pack_weight(weight_of((134, 300), torch.bfloat16))
    x = normal(40, 300, dtype=torch.bfloat16)
    plain = OPS.packed_linear(x, packed, None, 134)
    assert torch.equal(OPS.packed_linear(x, packed, None, 134, "none"), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("epilogue", FUNCTIONS)
def test_kernel_knows_the_ends_of_a_function(epilogue: str, dtype: torch.dtype) -> None:
    weight = weight_of((64, 64), dtype)
    packed = OPS.pack_weight(weight)
    for size in (1e-3, 1e1, 1e2, 1e3, 1e9, 1e30):
        x = (normal(4, 64, dtype=torch.float32) * size).to(dtype)
        want = exact(x.double() @ weight.double().T, epilogue)
        error = (OPS.packed_linear(x, packed, None, 64, epilogue).double() - want).abs()
        assert float(error.max()) < TOLERANCE[dtype] * size, size


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_no_number_stays_none(epilogue: str, rows: int) -> None:
    packed = packed_of(weight_of((64, 64), torch.bfloat16), epilogue)
    x = normal(rows, 64, dtype=torch.bfloat16)
    want = OPS.packed_linear(x, packed, None, 64, epilogue)
    x[1, 5] = float("nan")
    found = OPS.packed_linear(x, packed, None, 64, epilogue)
    assert found[1].isnan().all()
    assert torch.equal(found[::2], want[::2])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("outputs", [134, 256])
@pytest.mark.parametrize("epilogue", ["silu_and_mul", "gelu_tanh"])
def test_neither_the_batch_nor_threads_change_a_bit(
    epilogue: str, outputs: int, dtype: torch.dtype
) -> None:
    packed = packed_of(weight_of((outputs, 300), dtype), epilogue)
    bias = normal(outputs, dtype=dtype, seed=2)
    x = normal(511, 300, dtype=dtype)
    whole = OPS.packed_linear(x, packed, bias, outputs, epilogue)
    for begin, end in ((0, 1), (510, 511), (3, 5), (7, 15), (20, 43), (20, 70), (1, 511)):
        part = OPS.packed_linear(x[begin:end], packed, bias, outputs, epilogue)
        assert torch.equal(part, whole[begin:end])
    with threads(3):
        assert torch.equal(OPS.packed_linear(x, packed, bias, outputs, epilogue), whole)


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64])
@pytest.mark.parametrize("shape", [(128, 64), (134, 63), (2, 3)])
def test_kernel_packs_gate_and_up_side_by_side(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = weight_of(shape, dtype)
    packed = OPS.pack_weight(weight, True)
    assert torch.equal(packed, OPS.pack_weight_reference(weight, True))
    assert torch.equal(OPS.pack_weight(weight.t().contiguous().t(), True), packed)
    assert torch.equal(unpack_weight(packed, *shape, True), weight)


def test_a_panel_has_both_factors_of_32_products() -> None:
    weight = torch.arange(256.0)[:, None].expand(256, 4).contiguous()
    packed = OPS.pack_weight(weight, True)
    assert torch.equal(packed[1, 0, :32], weight[32:64, :1])
    assert torch.equal(packed[1, 0, 32:], weight[128 + 32 : 128 + 64, :1])


def test_kernel_packs_gates_of_experts_each_by_itself() -> None:
    experts = torch.stack([weight_of((70, 41), torch.bfloat16) * scale for scale in (1, 2)])
    packed = OPS.pack_weight(experts, True)
    assert torch.equal(packed, OPS.pack_weight_reference(experts, True))
    assert torch.equal(packed[1], OPS.pack_weight(experts[1], True))


def test_kernel_with_no_rows_and_with_no_inputs() -> None:
    packed = OPS.pack_weight(torch.ones(70, 8), True)
    assert OPS.packed_linear(torch.ones(2, 0, 8), packed, None, 70, "relu_and_mul").shape == (
        2,
        0,
        35,
    )
    empty, bias = OPS.pack_weight(torch.ones(70, 0), True), torch.arange(70.0)
    found = OPS.packed_linear(torch.ones(2, 0), empty, bias, 70, "relu_and_mul")
    assert torch.equal(found[1], bias[:35] * bias[35:])


def test_what_does_not_fit_is_an_error(registered: str) -> None:
    if registered == "reference":
        pytest.skip("checked by the kernels")
    packed = OPS.pack_weight(torch.ones(63, 8))
    with pytest.raises(RuntimeError, match="63 outputs, an odd number"):
        OPS.packed_linear(torch.ones(1, 8), packed, None, 63, "silu_and_mul")
    for name in ("swish", "", "_and_mul"):
        with pytest.raises(RuntimeError, match=f'epilogue is "{name}"'):
            OPS.packed_linear(torch.ones(1, 8), packed, None, 63, name)
    with pytest.raises(RuntimeError, match="63 outputs, an odd number"):
        OPS.pack_weight(torch.zeros(63, 8), True)
