"""compat: transformers finds the names of its files as it does by itself, and reads less."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers.utils import import_utils

from fxlm.models import compat

FILES = {
    "one line": 'import os\n\n__all__ = ["A", "B"]\n',
    "several": '__all__ = [\n    "A",\n    "B",\n]\nx = 1\n',
    "none": "import os\n",
    "not at a line's start": '"""About __all__."""\n',
    "twice": '__all__ = ["A"]\n__all__ = ["B", "C"]\n',
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_names_of_a_file_are_those_that_transformers_finds(content: str) -> None:
    utils = SimpleNamespace(
        fetch__all__=import_utils.fetch__all__, create_import_structure_from_path=len
    )
    compat._look_once(utils)
    assert utils.fetch__all__(content) == import_utils.fetch__all__(content)


def test_a_folder_is_looked_into_once(tmp_path: Path) -> None:
    find = getattr(import_utils.create_import_structure_from_path, "__wrapped__", None)
    assert find is not None, "its cache is no longer one of 128 folders"
    for number in range(200):
        (tmp_path / f"m{number}").mkdir()
    utils = SimpleNamespace(
        fetch__all__=import_utils.fetch__all__,
        create_import_structure_from_path=import_utils.create_import_structure_from_path,
    )
    compat._look_once(utils)
    for number in range(200):
        utils.create_import_structure_from_path(str(tmp_path / f"m{number}"))
    (tmp_path / "m0" / "late.py").write_text('__all__ = ["A"]\n')
    assert utils.create_import_structure_from_path(str(tmp_path / "m0")) == {}
