"""bisect: the guilty pass, its layer, and a script that shows it; seeded faults of each kind."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fxlm.compiler.options import CompileOptions
from fxlm.compiler.pipeline import GraphPass
from fxlm.models.checkpoint import Checkpoint, open_checkpoint
from fxlm.models.tiny import write_checkpoint
from fxlm.runtime.explain.bisect import bisect
from fxlm.runtime.explain.repro import where, write_repro
from tests.runtime.explain.faults import not_a_number, wrong_op, wrong_scale, wrong_slice


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_checkpoint("llama", tmp_path_factory.mktemp("bisect")))


def options(*passes: GraphPass) -> CompileOptions:
    return CompileOptions(dtype="float32", eager=True, passes=passes)


def test_an_honest_column_is_not_blamed(checkpoint: Checkpoint) -> None:
    names: list[str] = []
    assert bisect(checkpoint, options(), tell=lambda line: names.append(line.name)) is None
    assert names[0] == "captured"
    assert names[-1] == "fuse_activation"


@pytest.mark.parametrize(
    ("fault", "layer", "module"),
    [(wrong_scale, 1, "model.layers.1"), (wrong_op, 0, "model.layers.0.mlp"),
     (not_a_number, 0, "model.layers.0.mlp"), (wrong_slice, 1, "model.layers.1.self_attn.k_proj")],
)  # fmt: skip
def test_a_seeded_fault_is_found(
    fault: GraphPass, layer: int, module: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    guilt = bisect(checkpoint, options(fault))
    assert guilt is not None
    assert (guilt.name, guilt.place.layer) == (fault.name, layer)
    assert guilt.place.module.startswith(module), where(guilt)
    script, _ = write_repro(guilt, tmp_path / "repro.py")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1, run.stderr
    assert "largest difference" in run.stdout


def test_tied_weights_in_half_precision_are_not_blamed(tmp_path: Path) -> None:
    """Nor is the captured graph given the inputs that later stages take."""
    path = write_checkpoint("llama", tmp_path / "tied", dtype="bfloat16", tie_word_embeddings=True)
    lines: list[tuple[str, bool]] = []
    found = bisect(
        open_checkpoint(path),
        CompileOptions(eager=True),
        tell=lambda line: lines.append((line.name, line.deviates)),
    )
    assert found is None
    ends = ["captured", "fuse_activation"]
    assert lines == [(name, False) for name in [*ends, *ends]]  # in bfloat16, then in float32


class Faulty(TorchDispatchMode):
    """A kernel that is wrong: packed linears forget their last panel."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        wrong = func is torch.ops.fxlm.packed_linear.default
        if wrong and not isinstance(made, torch._subclasses.FakeTensor):
            made = made.clone()
            made[..., -16:] = 0
        return made


@contextmanager
def faulty_kernel() -> Iterator[None]:
    with Faulty():
        yield


def test_a_wrong_kernel_is_found_in_the_pass_that_placed_it(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with faulty_kernel():
        guilt = bisect(checkpoint, options())
    assert guilt is not None
    assert (guilt.name, guilt.place.layer) == ("pack_linears", 0)
    script, _ = write_repro(guilt, tmp_path / "repro.py")
    main = runpy.run_path(str(script))["main"]
    assert main() == 0  # the kernel is right again
    with faulty_kernel():
        assert main() == 1


def test_tolerance_is_the_users(checkpoint: Checkpoint) -> None:
    assert bisect(checkpoint, options(wrong_scale), tolerance=1e3) is None
