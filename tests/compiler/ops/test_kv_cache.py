"""The order of a cache, its codes, and the memory it lies in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxlm.compiler.ops import kv_cache


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize(("steps", "lanes"), [(64, 16), (16, 20), (7, 16)])
def test_every_element_has_a_place_of_its_own(itemsize: int, steps: int, lanes: int) -> None:
    place = kv_cache.order(steps, lanes, itemsize, torch.device("cpu"))
    assert place.flatten().sort().values.tolist() == list(range(steps * lanes))


def test_steps_of_one_instruction_lie_side_by_side() -> None:
    cpu = torch.device("cpu")
    halves = kv_cache.order(4, 16, 2, cpu)
    assert [int(halves[at]) for at in ((0, 0), (1, 0), (0, 1), (2, 0))] == [0, 1, 2, 32]
    codes = kv_cache.order(8, 16, 1, cpu)
    places = [int(codes[at]) for at in ((0, 0), (1, 0), (0, 1), (2, 0), (3, 1), (0, 4), (4, 0))]
    assert places == [0, 1, 2, 8, 11, 16, 64]


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.int8, 0.5 / 127), (torch.float8_e4m3fn, 16 / 448)]
)
def test_codes_are_within_half_a_step(dtype: torch.dtype, bound: float) -> None:
    x = torch.randn(50, 3, 64, generator=torch.Generator().manual_seed(1))
    codes, scales = kv_cache.quantize(x, dtype, None)
    back = codes.view(dtype).float() * scales[..., None]
    assert ((back - x).abs() <= bound * x.abs().amax(-1, keepdim=True) * 1.0001).all()


def test_zeros_stay_zeros() -> None:
    codes, scales = kv_cache.quantize(torch.zeros(1, 1, 8), torch.int8, None)
    assert codes.abs().max() == 0
    assert scales.isfinite().all()


def test_memory_is_touched_when_it_is_used() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    cache = kv_cache.allocate((1024, 4, 16, 1024), torch.float32, torch.device("cpu"))
    assert resident() - before < cache.nbytes // 8
    assert cache.shape == (1024, 4, 16, 1024)
    assert cache[5].abs().max() == 0
    cache[7] = 1
    assert cache.data_ptr() % 64 == 0
