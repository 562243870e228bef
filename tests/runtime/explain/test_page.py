"""The page: what is on it, that it fetches nothing, and that a real browser lays it out."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fxlm.compiler.errors import InvalidOption
from fxlm.compiler.options import CompileOptions
from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program
from fxlm.models.checkpoint import Checkpoint, open_checkpoint
from fxlm.models.tiny import write_checkpoint
from fxlm.runtime.explain.page import render
from fxlm.runtime.explain.report import Choices, explain
from fxlm.runtime.explain.text import lines
from tests.runtime.explain.browser import MISSING, find_browser, run_browser

Report = dict[str, Any]
# What the browser says of itself once the page is open: errors, width, figures.
PROBE = """<script>{
const root = document.documentElement, all = q => [...document.querySelectorAll(q)];
const boxes = all("svg.layer .box.added").filter(b => b.getBoundingClientRect().width > 20);
const tools = document.querySelector(".tools[data-for]");
const figure = document.getElementById(tools.dataset.for);
tools.querySelector("[data-show=before]").click();
const added = [...figure.querySelectorAll(".box.added")];
const style = getComputedStyle(document.body);
document.body.dataset.probe = JSON.stringify({
  wide: root.scrollWidth, seen: innerWidth, boxes: boxes.length, ready: root.dataset.ready,
  hidden: added.every(b => getComputedStyle(b).visibility === "hidden"),
  ink: style.color, paper: style.backgroundColor, theme: root.dataset.theme});
}</script>"""


def brightness(color: str) -> float:
    """Of a computed colour, e.g. ``rgb(16, 20, 27)``; 0 is black, 255 white."""
    red, green, blue = map(int, re.findall(r"\d+", color)[:3])
    return 0.299 * red + 0.587 * green + 0.114 * blue


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_checkpoint("llama", tmp_path_factory.mktemp("page")))


@pytest.fixture(scope="module")
def report(checkpoint: Checkpoint) -> Report:
    options = CompileOptions(dtype="float32")
    made = explain(checkpoint, options, Choices(times="none", limits=False))
    made["machine"] |= {"read_gbs": 40.0, "matmul_tflops": 0.5}
    return made


@pytest.fixture(scope="module")
def timed(report: Report) -> Report:
    """With times, which the tests do not measure."""
    made = copy.deepcopy(report)
    for entry in made["passes"][2:4]:
        rows = [{"shape": s["name"], "with_ms": 1.0, "without_ms": 1.5} for s in made["shapes"]]
        entry["without"] = {"times": rows}
    return made


def test_every_pass_is_reported(report: Report) -> None:
    names = [p["name"] for p in report["passes"]]
    assert names[0] == "captured"
    assert {"fuse_qkv", "paged_attention", "sample"} <= set(names)
    fused = report["passes"][names.index("fuse_qkv")]
    assert fused["rewrites"] == 2
    assert "def fuse_qkv(" in fused["source"]
    assert fused["layer"]["number"] == 0
    assert max(e["absolute"] for e in fused["errors"].values()) < 1e-3
    assert set(report["passes"][-1]["errors"]) == set(report["passes"][-1]["errors_before"])
    assert json.loads(json.dumps(report))["passes"][0]["name"] == "captured"


def test_the_terminal_has_a_line_a_pass(timed: Report) -> None:
    said = list(lines(timed))
    assert len(said) == 1 + len(timed["passes"]) + len(timed["shapes"])
    assert any(line.startswith("fuse_qkv") and line.endswith("1.50 x") for line in said)
    one = "\n".join(lines(timed, ["fuse_qkv"]))
    assert "def fuse_qkv(" in one
    assert "+cat_default" in one


def test_times_of_a_busy_machine_are_called_that(timed: Report) -> None:
    assert "The machine was busy" not in render(timed)
    busy = copy.deepcopy(timed)
    busy["passes"][3]["without"]["times"][0] |= {"with_ms": 9.0, "without_ms": 9.5}
    said = "The machine was busy: the same step took 1 to 9 ms."
    assert said in render(busy)
    assert any(line.startswith(said) for line in lines(busy))


@graph_pass(after="cleanup")
def talkative(program: Program) -> int:
    """A pass that says what it decided."""
    program.note("nothing <to> do")
    return 0


def test_what_a_pass_decided_is_shown(checkpoint: Checkpoint) -> None:
    choices = Choices(numbers=False, times="none", limits=False)
    made = explain(checkpoint, CompileOptions(passes=(talkative,)), choices)
    assert "note: nothing <to> do" in list(lines(made, ["talkative"]))
    assert "<li>nothing &lt;to&gt; do</li>" in render(made)


def test_an_unknown_pass_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(InvalidOption, match="did you mean 'fuse_qkv'"):
        explain(checkpoint, CompileOptions(), Choices(numbers=False), wanted=["fuse_qvk"])


def test_the_page_fetches_nothing(timed: Report) -> None:
    page = render(timed)
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_names_from_a_checkpoint_are_escaped(timed: Report) -> None:
    evil = {**timed, "model": {**timed["model"], "name": "<script>alert(1)</script>"}}
    assert "<script>alert(1)" not in render(evil)


def test_a_report_without_numbers_is_a_page(checkpoint: Checkpoint) -> None:
    choices = Choices(numbers=False, times="none", limits=False)
    page = render(explain(checkpoint, CompileOptions(), choices))
    assert "fuse_qkv" in page
    assert 'id="errors"' not in page


@pytest.mark.skipif(find_browser() is None, reason=MISSING)
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 500])  # the narrowest window of a headless Chromium
def test_in_a_browser(width: int, theme: str, timed: Report, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render(timed).replace("</body>", PROBE + "</body>"), encoding="utf-8")
    flags = [f"--window-size={width},1000", "--dump-dom"]
    dark = ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
    dom = run_browser(page, tmp_path / "profile", *flags, *dark)
    found = json.loads(re.search(r'data-probe="(.*?)"', dom)[1].replace("&quot;", '"'))  # type: ignore[index]
    assert found["ready"] == "true"
    assert found["wide"] <= found["seen"], "the page scrolls sideways"
    assert found["boxes"] >= 5
    assert found["hidden"]
    assert found["theme"] == theme
    ink, paper = brightness(found["ink"]), brightness(found["paper"])
    assert (paper < 40 and ink > 200) if theme == "dark" else (paper > 240 and ink < 60)


@pytest.mark.skipif(find_browser() is None, reason=MISSING)
def test_it_can_be_photographed(timed: Report, tmp_path: Path) -> None:
    page, shot = tmp_path / "page.html", tmp_path / "shot.png"
    page.write_text(render(timed), encoding="utf-8")
    flags = ["--window-size=1200,2000", f"--screenshot={shot}"]
    run_browser(page, tmp_path / "profile", *flags)
    assert shot.read_bytes().startswith(b"\x89PNG")
    assert shot.stat().st_size > 50_000  # a blank page is a few kilobytes
