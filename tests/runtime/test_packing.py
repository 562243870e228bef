"""Whether weights are packed: decided once, from device, type and CPU, and part of the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxlm.compiler.options import CompileOptions
from fxlm.models.checkpoint import open_checkpoint
from fxlm.runtime import front as compiling
from fxlm.runtime.compile import compile_model
from fxlm.runtime.front import column_of, packing


@pytest.fixture
def plain_cpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(compiling, "cpu_flags", lambda: frozenset({"avx2"}))
    monkeypatch.setattr(compiling, "cpu_implementation", lambda: "avx2")
    return monkeypatch


def test_packed_where_it_pays(plain_cpu: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert packing(CompileOptions(), dtype)[0]
    assert packing(CompileOptions(), torch.float16) == (False, "oneDNN serves float16")
    assert not packing(CompileOptions(device="cuda"), torch.bfloat16)[0]


def test_not_packed_where_the_cpu_has_tiles_that_the_kernels_do_not_use(
    plain_cpu: pytest.MonkeyPatch,
) -> None:
    plain_cpu.setattr(compiling, "cpu_flags", lambda: frozenset({"avx2", "amx_bf16"}))
    packs, why = packing(CompileOptions(), torch.bfloat16)
    assert not packs
    assert "AMX" in why
    assert packing(CompileOptions(pack_weights=True), torch.bfloat16) == (True, "asked for")
    plain_cpu.setattr(compiling, "cpu_implementation", lambda: "amx")
    assert packing(CompileOptions(), torch.bfloat16)[0]


@pytest.mark.parametrize("kernels", ["reference", "generic"])
def test_not_packed_without_fast_kernels(plain_cpu: pytest.MonkeyPatch, kernels: str) -> None:
    plain_cpu.setattr(compiling, "cpu_implementation", lambda: kernels)
    assert not packing(CompileOptions(), torch.float32)[0]


def test_the_column_follows() -> None:
    names = {choice: [p.name for p in column_of(CompileOptions(pack_weights=choice))]
             for choice in (True, False)}  # fmt: skip
    *others, last = names[False]
    assert names[True] == [*others, "pack_linears", last]
    both = CompileOptions(pack_weights=False, disabled=("pack_linears",))
    assert [p.name for p in column_of(both)] == names[False]


def test_the_choice_is_part_of_the_key(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("bundled-draft")
    made = [
        compile_model(
            checkpoint, CompileOptions(eager=True, pack_weights=choice), cache_dir=tmp_path
        ).artifact
        for choice in (True, False)
    ]
    assert made[0].key != made[1].key
    used = ["pack_linears" in [p["name"] for p in a.manifest["passes"]] for a in made]
    assert used == [True, False]
