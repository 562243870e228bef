"""Tensors on the CPU come from a pool: aligned, whole, wherever they are made and dropped."""

import threading
from collections.abc import Iterator

import pytest
import torch

from fxlm.compiler import ops

SIZES = [1, 63, 64, 65, 511, 512, 513, 640, 641, 4097, 1 << 15, (1 << 20) - 1, 1 << 20, 3 << 20]


@pytest.fixture(autouse=True)
def _loaded() -> None:
    if ops.cpu_implementation() == "reference":
        pytest.skip("the pool is part of the kernels' library")


def _filled(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8).fill_(size % 251)


def _tensors(rounds: int) -> Iterator[torch.Tensor]:
    """Tensors of all sizes, older ones dropped as new ones come."""
    kept: list[torch.Tensor] = []
    for number in range(rounds * len(SIZES)):
        kept.append(_filled(SIZES[number % len(SIZES)]))
        if len(kept) > 20:
            del kept[:: 1 + number % 3]
        yield from kept


@pytest.mark.parametrize("size", SIZES)
def test_memory_is_aligned(size: int) -> None:
    assert _filled(size).data_ptr() % 64 == 0


def test_nobody_writes_to_anothers_memory() -> None:
    assert all((tensor == tensor.numel() % 251).all() for tensor in _tensors(3))


def test_what_was_dropped_is_handed_out_again() -> None:
    place = _filled(5000).data_ptr()
    assert _filled(5100).data_ptr() == place


def test_an_empty_tensor_has_no_memory() -> None:
    assert torch.empty(0).data_ptr() == 0


def test_tensors_outlive_the_thread_that_made_them() -> None:
    made: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: made.extend(_filled(size) for size in SIZES))
    thread.start()
    thread.join()
    assert all((tensor == tensor.numel() % 251).all() for tensor in made)
    made.clear()
    assert all((tensor == tensor.numel() % 251).all() for tensor in _tensors(1))


def test_storage_grows_with_what_it_holds() -> None:
    tensor = _filled(100)
    tensor.resize_(5000)
    assert (tensor[:100] == 100).all()


def test_too_much_memory_is_an_error_of_torchs() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_a_negative_size_is_an_error_of_torchs() -> None:
    with pytest.raises(RuntimeError, match="negative"):
        torch.empty(10).untyped_storage().resize_(-64)
