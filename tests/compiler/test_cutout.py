"""cutout: the code of one value, as Python that runs."""

from __future__ import annotations

import torch

from fxlm.compiler.cutout import cutout, value_text
from fxlm.passes.cleanup import cleanup
from tests.programs import captured


def test_it_runs_on_its_boundary() -> None:
    program = captured()
    cleanup.run(program)
    silu = program.find(torch.ops.aten.silu.default)[0]
    gate = silu.all_input_nodes[0]
    made = cutout(program, silu.name, {gate.name}, "it")
    assert made.text.splitlines()[0] == f"def it({gate.name}):"
    assert made.inputs == [gate.name]
    assert made.ops == ["aten.silu.default"]


def test_the_whole_program_takes_its_placeholders() -> None:
    program = captured()
    made = cutout(program, None, set(), "whole")
    assert set(made.inputs) == {n.name for n in program.placeholders()}
    assert made.text.rstrip().splitlines()[-1].strip().startswith("return (")
    compile(made.text, "cutout", "exec")


def test_values_are_python() -> None:
    assert value_text([1, (2,), float("inf")]) == "[1, (2,), float('inf')]"
    assert value_text(torch.device("cpu")) == "torch.device('cpu')"
    assert value_text(torch.float32) == "torch.float32"
