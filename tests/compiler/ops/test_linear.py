"""Packed linear layers: kernels against float64, layout, and no bit that depends on the batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from fxlm.compiler.ops import linear

OPS = torch.ops.fxlm
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
ROWS = (1, 2, 3, 6, 7, 17, 511)
# outputs, inputs: whole panels, one more and one less, smaller than a vector, odd, several blocks
SHAPES = ((64, 64), (65, 63), (200, 129), (1, 1), (3, 7), (129, 700))


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def weight_of(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return (normal(*shape, dtype=torch.float32, seed=1) / shape[1] ** 0.5).to(dtype)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_kernel_equals_float64(dtype: torch.dtype, shape: tuple[int, int], with_bias: bool) -> None:
    weight, n = weight_of(shape, dtype), shape[0]
    bias = normal(n, dtype=dtype, seed=2) if with_bias else None
    packed = OPS.pack_weight(weight)
    for rows in ROWS:
        x = normal(rows, shape[1], dtype=dtype, seed=rows)
        want = torch.nn.functional.linear(
            x.double(), weight.double(), None if bias is None else bias.double()
        )
        for op in (OPS.packed_linear, OPS.packed_linear_reference):
            got = op(x, packed, bias, n)
            assert got.dtype == dtype
            torch.testing.assert_close(
                got.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
            )


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_packs_as_the_layout_says(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = weight_of(shape, dtype)
    packed = OPS.pack_weight(weight)
    assert torch.equal(packed, OPS.pack_weight_reference(weight))
    assert packed.shape == linear.fake_pack_weight(weight).shape
    assert torch.equal(linear.unpack_weight(packed, *shape), weight)
    step = linear.inputs_per_step(dtype)
    n, k = shape[0] - 1, shape[1] - 1
    assert packed[n // 64, k // step, n % 64, k % step] == weight[n, k]
    assert packed.double().abs().sum() == pytest.approx(float(weight.double().abs().sum()))


def test_kernel_packs_weights_of_any_strides() -> None:
    weight = weight_of((70, 41), torch.bfloat16)
    want = OPS.pack_weight(weight)
    wide = torch.zeros(70, 50, dtype=torch.bfloat16)
    wide[:, 3:44] = weight
    assert torch.equal(OPS.pack_weight(wide[:, 3:44]), want)
    assert torch.equal(OPS.pack_weight(weight.t().contiguous().t()), want)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(65, 63), (200, 900)])
def test_the_batch_changes_no_bit(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    packed, n = OPS.pack_weight(weight_of(shape, dtype)), shape[0]
    bias = normal(n, dtype=dtype, seed=2)
    x = normal(511, shape[1], dtype=dtype)
    whole = OPS.packed_linear(x, packed, bias, n)
    for begin, end in ((0, 1), (510, 511), (3, 5), (7, 15), (20, 43), (20, 70), (1, 511)):
        assert torch.equal(OPS.packed_linear(x[begin:end], packed, bias, n), whole[begin:end])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 8, 130])
def test_threads_change_no_bit(dtype: torch.dtype, rows: int) -> None:
    packed = OPS.pack_weight(weight_of((700, 300), dtype))
    x = normal(rows, 300, dtype=dtype)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(OPS.packed_linear(x, packed, None, 700))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_strides_change_no_bit(dtype: torch.dtype) -> None:
    packed = OPS.pack_weight(weight_of((70, 41), dtype))
    x = normal(2, 5, 3, 41, dtype=dtype)
    want = OPS.packed_linear(x, packed, None, 70)
    assert want.shape == (2, 5, 3, 70)
    assert want.is_contiguous()
    wide = torch.stack([x, x], dim=-1)[..., 0]  # no dense dimension
    assert torch.equal(OPS.packed_linear(wide, packed, None, 70), want)
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(OPS.packed_linear(swapped, packed, None, 70), want)
    assert torch.equal(OPS.packed_linear(x[1, 2, 1], packed, None, 70), want[1, 2, 1])
    assert torch.equal(OPS.packed_linear(x[:1].expand(4, 5, 3, 41), packed, None, 70)[3], want[0])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_no_number_of_one_output_reaches_another(dtype: torch.dtype) -> None:
    """Padding stays out of the results even where an input is not finite."""
    packed = OPS.pack_weight(weight_of((65, 63), dtype))
    x = normal(8, 63, dtype=dtype)
    want = OPS.packed_linear(x, packed, None, 65)
    x[3] = float("inf")
    got = OPS.packed_linear(x, packed, None, 65)
    assert torch.equal(got[:3], want[:3])
    assert torch.equal(got[4:], want[4:])
    assert not got[3].isfinite().any()


def test_kernel_with_no_rows_and_with_no_inputs() -> None:
    packed = OPS.pack_weight(torch.ones(70, 8))
    assert OPS.packed_linear(torch.ones(2, 0, 8), packed, None, 70).shape == (2, 0, 70)
    empty = OPS.pack_weight(torch.ones(70, 0))
    bias = torch.arange(70.0)
    assert torch.equal(OPS.packed_linear(torch.ones(2, 0), empty, bias, 70)[1], bias)


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64])
@pytest.mark.parametrize("shape", [(65, 63), (200, 128)])
def test_kernel_reads_rows_back(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = weight_of(shape, dtype)
    packed = OPS.pack_weight(weight)
    ids = torch.randint(0, shape[0], (3, 7), generator=torch.Generator().manual_seed(0))
    for op in (OPS.packed_rows, OPS.packed_rows_reference):
        assert torch.equal(op(packed, ids, shape[1]), weight[ids])
        assert torch.equal(op(packed, ids.t()[:2], shape[1]), weight[ids.t()[:2]])
        assert torch.equal(op(packed, ids.int(), shape[1]), weight[ids])


def test_float64_goes_to_the_reference() -> None:
    weight, x = weight_of((70, 41), torch.float64), normal(3, 41, dtype=torch.float64)
    got = OPS.packed_linear(x, OPS.pack_weight(weight), None, 70)
    torch.testing.assert_close(got, x @ weight.t(), atol=1e-13, rtol=1e-13)


def test_what_does_not_fit_is_an_error(registered: str) -> None:
    if registered == "reference":
        pytest.skip("checked by the kernels")
    packed = OPS.pack_weight(torch.ones(70, 8))
    with pytest.raises(RuntimeError, match="no packed weight of 9 inputs"):
        OPS.packed_linear(torch.ones(1, 9), packed, None, 70)
    with pytest.raises(RuntimeError, match="do not make 129 outputs"):
        OPS.packed_linear(torch.ones(1, 8), packed, None, 129)
    with pytest.raises(RuntimeError, match="bias is not"):
        OPS.packed_linear(torch.ones(1, 8), packed, torch.ones(69), 70)
    with pytest.raises(RuntimeError, match=r"ids\[1\] = 128"):
        OPS.packed_rows(packed, torch.tensor([0, 128]), 8)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(65, 63), (128, 200)])
def test_kernel_of_experts_equals_each_by_itself(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight = torch.stack([weight_of(shape, dtype) * scale for scale in (1, 2, 3, 4)])
    packed = OPS.pack_weight(weight)
    assert torch.equal(packed, OPS.pack_weight_reference(weight))
    assert torch.equal(OPS.pack_weight(weight.mT.contiguous().mT), packed)
    x = normal(40, shape[1], dtype=dtype)
    ends = torch.tensor([1, 18, 18, 37])
    for offsets in (ends, ends.int()):
        got = OPS.packed_grouped_linear(x, packed, offsets, shape[0])
        for expert, (begin, end) in enumerate(((0, 1), (1, 18), (18, 18), (18, 37))):
            want = OPS.packed_linear(x[begin:end], packed[expert], None, shape[0])
            assert torch.equal(got[begin:end], want)
        assert not got[37:].any(), "rows of no expert are zero"
        reference = OPS.packed_grouped_linear_reference(x, packed, offsets, shape[0])
        torch.testing.assert_close(got, reference, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_experts_that_do_not_fit_are_an_error(registered: str) -> None:
    if registered == "reference":
        pytest.skip("checked by the kernels")
    packed, x = OPS.pack_weight(torch.ones(2, 70, 8)), torch.ones(4, 8)
    for offsets in ([1, 5], [3, 2], [1]):
        with pytest.raises(RuntimeError, match="offsets"):
            OPS.packed_grouped_linear(x, packed, torch.tensor(offsets), 70)
