"""The example of docs/passes.md is what the file holds, runs, and changes the output."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from fxlm import LLM, SamplingParams

REPO = Path(__file__).resolve().parents[2]
EXAMPLE = REPO / "docs" / "examples" / "scale_residual.py"


def code(text: str) -> list[str]:
    """Statements without docstring and comments."""
    statements = ast.parse(text).body
    return [ast.unparse(s) for s in statements if not isinstance(s, ast.Expr)]


def test_the_page_shows_the_file() -> None:
    page = (REPO / "docs" / "passes.md").read_text()
    block = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    assert code(block) == code(EXAMPLE.read_text())


def test_it_runs_and_changes_the_output() -> None:
    options = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 2}
    params = SamplingParams(temperature=0.0, max_tokens=8)
    plain = LLM("bundled-draft", **options)
    changed = LLM("bundled-draft", passes=[f"{EXAMPLE}:halve_mlp"], **options)
    prompt = "def add(a, b):"
    before = plain.generate(prompt, params)[0].outputs[0].token_ids
    assert changed.generate(prompt, params)[0].outputs[0].token_ids != before
    (line,) = [p for p in changed.artifact.manifest["passes"] if p["name"] == "halve_mlp"]
    assert line["rewrites"] == changed.artifact.manifest["model"]["num_layers"]
