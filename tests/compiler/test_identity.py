"""Identity of a pass: what its source and its values are, so that no artifact serves another."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fxlm.compiler import identity
from fxlm.compiler.errors import PassError
from fxlm.compiler.pipeline import GraphPass, graph_pass
from fxlm.compiler.program import Program

FACTOR = 1.0


@dataclass
class Setting:
    scale: float
    names: tuple[str, ...] = ("a",)


def make(scale: Any) -> GraphPass:
    @graph_pass(name="scaled")
    def scaled(program: Program) -> int:
        return int(bool(scale))

    return scaled


def with_default(scale: Any) -> GraphPass:
    def scaled(program: Program, by: Any = scale) -> int:
        return int(bool(by))

    return graph_pass(scaled)


def with_keyword(scale: Any) -> GraphPass:
    def scaled(program: Program, *, by: Any = scale) -> int:
        return int(bool(by))

    return graph_pass(scaled)


def partial(scale: Any) -> GraphPass:
    def scaled(by: Any, program: Program) -> int:
        return int(bool(by))

    return GraphPass(name="scaled", run=functools.partial(scaled, scale))


def captured_function(scale: Any) -> GraphPass:
    return make(lambda: scale)


@pytest.mark.parametrize("maker", [make, with_default, with_keyword, partial, captured_function])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1.0, -3.0),
        ("a", "b"),
        ((1, [2]), (1, [3])),
        ({"a": 1}, {"a": 2}),
        (torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)),
        (Setting(1.0), Setting(2.0)),
        (torch.ops.aten.mul.Scalar, torch.ops.aten.mul.Tensor),
    ],
)
def test_what_a_pass_holds_is_part_of_it(
    maker: Callable[[Any], GraphPass], one: Any, other: Any
) -> None:
    assert maker(one).identity() == maker(one).identity()
    assert maker(one).identity() != maker(other).identity()


def test_a_value_is_named() -> None:
    assert make(2.5).identity()["values"] == {"scale": "2.5"}


def test_a_value_that_no_key_can_hold_is_refused_by_name() -> None:
    with pytest.raises(PassError, match="pass scaled: the value of scale is a generator"):
        make(x for x in "ab").identity()


def test_a_number_that_the_module_holds_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    @graph_pass
    def scaled(program: Program) -> int:
        return int(FACTOR)

    before = scaled.identity()
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", -3.0)
    assert scaled.identity() != before


def test_a_function_typed_in_is_told_by_its_code_and_values() -> None:
    def typed(text: str, **names: Any) -> Callable[..., int]:
        space: dict[str, Any] = {"__name__": "__nowhere__", **names}
        exec(text, space)
        return space["p"]  # type: ignore[no-any-return]

    text = "def p(program):\n    return [SCALE for _ in 'a'][0]"
    found = [
        (identity.source_digest(run), identity.values_of(run))
        for run in (typed(text, SCALE=1), typed(text, SCALE=1), typed(text, SCALE=2))
    ]
    assert found[0] == found[1] != found[2]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A pass in a module, with helpers beside it that are imported in every manner."""
    (tmp_path / "fxlm_pass.py").write_text(
        "import os, torch, fxlm_helper\nfrom fxlm_parts import one as part\n"
        "def p(program):\n    from fxlm_late import SCALE\n    return 0\n"
    )
    (tmp_path / "fxlm_helper.py").write_text("import fxlm_deep\n")
    for name in ("fxlm_deep", "fxlm_late", "fxlm_parts/__init__", "fxlm_parts/two"):
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text("SCALE = 1.0\n")
    (tmp_path / "fxlm_parts" / "one.py").write_text("from .two import SCALE\n")
    (tmp_path / "fxlm_other.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith(("fxlm_pass", "fxlm_helper", "fxlm_parts",
                                                         "fxlm_deep", "fxlm_late"))]:  # fmt: skip
        del sys.modules[name]


@pytest.mark.parametrize(
    "name", ["fxlm_pass", "fxlm_helper", "fxlm_deep", "fxlm_late", "fxlm_parts/__init__",
             "fxlm_parts/one", "fxlm_parts/two"],
)  # fmt: skip
def test_the_modules_that_a_pass_imports_are_its_source(package: Path, name: str) -> None:
    run = importlib.import_module("fxlm_pass").p
    before = identity.source_digest(run)
    (package / "fxlm_other.py").write_text("SCALE = 2.0\n")
    assert identity.source_digest(run) == before
    file = package / f"{name}.py"
    file.write_text(file.read_text() + "SCALE = -3.0\n")
    assert identity.source_digest(run) != before
