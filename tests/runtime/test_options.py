"""EngineOptions: unknown names and wrong values are errors that name themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fxlm.compiler.errors import InvalidOption
from fxlm.runtime.options import EngineOptions, from_mapping, load_pass


def test_none_is_the_default() -> None:
    assert from_mapping({"max_model_len": None, "model": "x"}) == EngineOptions(model="x")


def test_round_trip_through_json() -> None:
    options = EngineOptions(model="x", passes=("a.py:b",), disable_passes=("cleanup",), seed=3)
    assert from_mapping(options.as_json()) == options


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_num_seq": 1}, "did you mean 'max_num_seqs'"),
        ({"max_num_seqs": "8"}, "max_num_seqs='8' cannot be used: Expected `int`, got `str`"),
        ({"max_num_seqs": 0}, "must be at least 1"),
        ({"memory_fraction": 1.5}, "0 < value <= 1"),
        ({"scheduling_policy": "lifo"}, "Invalid enum value 'lifo'"),
    ],
)
def test_wrong_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        from_mapping(values)


def test_pass_objects_cannot_cross_to_a_process() -> None:
    with pytest.raises(InvalidOption, match=r"takes file\.py:name"):
        EngineOptions(passes=(object(),)).as_json()


def test_a_file_of_passes(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from fxlm import graph_pass\n@graph_pass\ndef mine(program): return 0\n")
    assert load_pass(f"{file}:mine").name == "mine"
    for name, words in (("Mine_", "did you mean 'mine'"), ("yours", "it has mine")):
        with pytest.raises(InvalidOption, match=f"no @graph_pass function '{name}'; {words}"):
            load_pass(f"{file}:{name}")
    file.write_text("import nothing_of_this_name\n")
    with pytest.raises(InvalidOption, match="the file does not import: ModuleNotFoundError"):
        load_pass(f"{file}:mine")
