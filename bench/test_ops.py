"""Micro-benches of the CPU ops: ``pytest bench --benchmark-only``. No part of the test suite.

Each op runs on the sizes of one layer of Llama-3.2-1B, over copies of its weight that together
exceed the caches. pytest-benchmark compares runs (``--benchmark-autosave``,
``--benchmark-compare``); what is claimed in docs/measurements.md comes from ``ops.py``, whose
sides take turns in one run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from fxlm.compiler import ops

Benchmark = Callable[..., object]

COLD_BYTES = 256 << 20
SHAPES = {"qkv": (3072, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)}
EXPERTS = (8, 2048, 1024)  # experts, outputs, inputs


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    ops.load()


@pytest.mark.parametrize("rows", [1, 5, 8, 32, 512])
@pytest.mark.parametrize("layer", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_linear(benchmark: Benchmark, rows: int, layer: str, dtype: torch.dtype) -> None:
    outputs, inputs = SHAPES[layer]
    copies = max(1, COLD_BYTES // (outputs * inputs * dtype.itemsize))
    one = torch.ops.fxlm.pack_weight(torch.randn(outputs, inputs).to(dtype))
    turns = itertools.cycle([one, *(one.clone() for _ in range(copies - 1))])
    x = torch.randn(rows, inputs).to(dtype)
    benchmark(lambda: torch.ops.fxlm.packed_linear(x, next(turns), None, outputs))


@pytest.mark.parametrize("rows", [2, 16, 256])
def test_packed_grouped_linear(benchmark: Benchmark, rows: int) -> None:
    experts, outputs, inputs = EXPERTS
    packed = torch.ops.fxlm.pack_weight(torch.randn(EXPERTS).bfloat16())
    x = torch.randn(rows, inputs).bfloat16()
    ends = torch.linspace(0, rows, experts + 1)[1:].int()
    benchmark(lambda: torch.ops.fxlm.packed_grouped_linear(x, packed, ends, outputs))


@pytest.mark.parametrize("rows", [1, 512])
def test_packed_rows(benchmark: Benchmark, rows: int) -> None:
    packed = torch.ops.fxlm.pack_weight(torch.randn(32768, 2048).bfloat16())
    ids = torch.randint(0, 32768, (rows,))
    benchmark(lambda: torch.ops.fxlm.packed_rows(packed, ids, 2048))


def test_pack_weight(benchmark: Benchmark) -> None:
    weight = torch.randn(SHAPES["gate_up"]).bfloat16()
    benchmark(lambda: torch.ops.fxlm.pack_weight(weight))
