"""The report of models and ranks whose steps are not run, or whose sizes have sympy's names."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxlm.compiler.cost import Shape
from fxlm.compiler.options import CompileOptions
from fxlm.models.checkpoint import open_checkpoint
from fxlm.models.tiny import write_checkpoint
from fxlm.runtime.explain.page import render
from fxlm.runtime.explain.report import UNCHANGED, Choices, explain
from fxlm.runtime.explain.text import RECOMPUTED, lines


@pytest.mark.parametrize(("family", "kind"), [("llama", "tp"), ("mixtral", "tp"), ("llama", "pp")])
def test_a_rank_shows_its_structure_without_errors(family: str, kind: str, tmp_path: Path) -> None:
    ways = {"ranks": 2} if kind == "tp" else {"stages": 2}
    said: list[str] = []
    report = explain(
        open_checkpoint(write_checkpoint(family, tmp_path)),
        CompileOptions(dtype="float32", **ways),  # type: ignore[arg-type]
        Choices(limits=False), tell=said.append,
    )  # fmt: skip
    name = "shard" if kind == "tp" else "cut_stages"
    assert "errors and times are left out" in said[0]
    entry = next(entry for entry in report["passes"] if entry["name"] == name)
    assert entry["rewrites"]
    assert "errors" not in entry
    report["machine"] |= {"read_gbs": 40.0, "matmul_tflops": 0.5}
    assert any(name in line for line in lines(report))
    assert any(line.startswith("calls ") for line in lines(report, [name]))
    assert name in render(report)


def test_experts_whose_sizes_are_sums_of_a_step_are_shown(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint("mixtral", tmp_path))
    choices = Choices(numbers=False, times="none", limits=False)
    report = explain(checkpoint, CompileOptions(dtype="float32"), choices)
    assert report["passes"][-1]["layer"]


def test_costs_are_those_of_the_shapes_that_are_asked_for() -> None:
    shape = Shape(name="wide", num_seqs=32, num_new=1, context=1024)
    choices = Choices(numbers=False, times="none", limits=False, shapes=(shape,))
    report = explain(open_checkpoint("bundled-draft"), CompileOptions(), choices)
    (cost,) = report["passes"][-1]["costs"]
    cache = report["model"]["num_layers"] * 32 * 1025 * 2
    assert cost["shape"] == "wide"
    assert cost["cache_bytes"] % cache == 0
    assert cost["cache_bytes"] > 0


def test_costs_without_a_cache_say_that_the_context_is_run_anew() -> None:
    shape = Shape(name="wide", num_seqs=32, num_new=1, context=1024)
    choices = Choices(numbers=False, times="none", limits=False, shapes=(shape,))
    report = explain(open_checkpoint("bundled-draft"), CompileOptions(), choices)
    tokens = {entry["name"]: entry["costs"][0]["tokens"] for entry in report["passes"]}
    assert (tokens["fuse_qkv"], tokens["paged_attention"]) == (32 * 1024, 32)
    assert RECOMPUTED in lines(report, ["fuse_qkv"])
    assert RECOMPUTED not in lines(report, ["pack_linears"])
    assert RECOMPUTED.capitalize() in render(report)


def test_the_step_without_a_pass_that_changed_nothing_is_not_timed() -> None:
    shape = Shape(name="one", num_seqs=1, num_new=1, context=2)
    said: list[str] = []
    choices = Choices(numbers=False, limits=False, shapes=(shape,))
    report = explain(open_checkpoint("bundled-draft"), CompileOptions(), choices, tell=said.append)
    without = {e["name"]: e["without"] for e in report["passes"] if "without" in e}
    assert without["fuse_quantized_linear"] == {"required": False, "reason": UNCHANGED}
    assert "times" in without["fuse_qkv"]
    assert "the step without fuse_quantized_linear" not in said
    report["machine"] |= {"read_gbs": 40.0, "matmul_tflops": 0.5}
    assert "<b>nothing to do</b>" in render(report)
    found = lines(report)
    assert any(line.startswith("fuse_quantized_linear") and "the same" in line for line in found)
    (required,) = (entry for entry in report["passes"] if entry["name"] == "sample")
    required["rewrites"] = 0
    report["passes"] = [report["passes"][0], required]
    assert "<b>always on</b>" in render(report)
    assert "nothing to do" not in render(report)
    assert any(line.startswith("sample") and line.endswith("always on") for line in lines(report))
