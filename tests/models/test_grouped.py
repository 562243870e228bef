"""fxlm::grouped_linear and the experts built on it."""

import pytest
import torch

from fxlm.compiler.ops import grouped
from fxlm.models.experts import Routing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_equals_one_row_at_a_time(dtype: torch.dtype, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, generator=generator).to(dtype)
    weight = torch.randn(4, 6, 5, generator=generator).to(dtype)
    offsets = torch.tensor([3, 3, 5, 6], dtype=torch.int32)
    given = weight.transpose(1, 2).contiguous().transpose(1, 2) if transposed else weight
    out = torch.ops.fxlm.grouped_linear(x, given, offsets)
    for row, group in enumerate([0, 0, 0, 2, 2, 3]):
        torch.testing.assert_close(out[row], weight[group] @ x[row], rtol=1e-2, atol=1e-2)
    assert not out[6].any(), "a row of no group gives 0"


def test_fake_and_schema() -> None:
    x, weight = torch.randn(4, 5), torch.randn(2, 3, 5)
    offsets = torch.tensor([1, 4], dtype=torch.int32)
    torch.library.opcheck(torch.ops.fxlm.grouped_linear.default, (x, weight, offsets))
    assert grouped.reference(x[:0], weight, offsets * 0).shape == (0, 3)


def test_routing_sorts_and_restores() -> None:
    index = torch.tensor([[2, 0], [1, 3], [0, 2]])  # 3 experts: id 3 is none
    routing = Routing(index, 3)
    assert routing.ids.tolist() == [0, 0, 1, 2, 2, 3]
    assert routing.offsets.tolist() == [2, 3, 5]
    hidden = torch.arange(3.0)[:, None]
    weights = torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, 6.0]])
    combined = routing.combine(routing.rows(hidden), weights)
    assert torch.equal(combined, hidden * weights.sum(1, keepdim=True))
