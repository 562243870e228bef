"""The helpers of the benches: what they write and print. No figure is asserted on."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/common.py, imported as a bench imports it."""
    monkeypatch.syspath_prepend(str(REPO / "bench"))
    return importlib.import_module("common")


def test_results_carry_the_machine_and_no_place(common: ModuleType, tmp_path: Path) -> None:
    path = common.write_results("x", [{"rate": 1.5}], options={"n": 2}, output=tmp_path / "x.json")
    text = path.read_text(encoding="utf-8")
    document = json.loads(text)
    assert document["bench"] == "x"
    assert document["options"] == {"n": 2}
    assert document["results"] == [{"rate": 1.5}]
    assert document["machine"]["versions"]["torch"] == torch.__version__
    assert document["machine"]["cores"] >= 1
    assert str(REPO) not in text
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_table_aligns_numbers(common: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    common.print_table([{"name": "a", "rate": 1234.5}, {"name": "long", "rate": None}], title="T")
    assert capsys.readouterr().out.splitlines() == [
        "",
        "T",
        "name  rate",
        "----  ----",
        "a     1234",
        "long     -",
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.00"), (0.001, "1.00e-03"), (1.234, "1.23"), (56.78, "56.8")]
)
def test_cells_keep_three_digits(common: ModuleType, value: float, text: str) -> None:
    assert common._cell(value) == text


def test_probes_measure_something(common: ModuleType) -> None:
    assert common.read_bandwidth_gbs(size_bytes=1 << 20, repeats=1) > 0
    assert common.matmul_rate_tflops(torch.float32, size=64, repeats=1) > 0
