"""docs/passes.md shows each file of docs/examples as it is, and each does what the page says."""

from __future__ import annotations

import runpy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fxlm import LLM, SamplingParams
from fxlm.models.checkpoint import resolve

REPO = Path(__file__).resolve().parents[2]
EXAMPLES = REPO / "docs" / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))
PROMPT = "def add(a, b):"
OPTIONS: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 2}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_page_shows_the_file(file: Path) -> None:
    assert f"```python\n{file.read_text()}```" in (REPO / "docs" / "passes.md").read_text()


def run(name: str) -> dict[str, Any]:
    """The names of an example that was run as a script."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def complete(llm: LLM, **params: Any) -> Any:
    wanted = SamplingParams(temperature=0.0, max_tokens=8, **params)
    return llm.generate(PROMPT, wanted)[0].outputs[0]


@cache
def plain() -> LLM:
    return LLM("bundled-draft", **OPTIONS)


def oracle(**config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    path = resolve("bundled-draft")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **config).eval()


def ids_of(llm: LLM, answer: Any) -> torch.Tensor:
    """[1, T]: what the graph saw, the prompt and the answer but its last token."""
    return torch.tensor([[*llm.get_tokenizer().encode(PROMPT), *answer.token_ids[:-1]]])


def count_of(llm: LLM, name: str) -> int:
    (line,) = [p for p in llm.artifact.manifest["passes"] if p["name"] == name]
    return int(line["rewrites"])


def test_scale_residual_changes_the_tokens() -> None:
    llm = LLM("bundled-draft", passes=[f"{EXAMPLES / 'scale_residual.py'}:halve_mlp"], **OPTIONS)
    assert complete(llm).token_ids != complete(plain()).token_ids
    assert count_of(llm, "halve_mlp") == llm.artifact.manifest["model"]["num_layers"]


def test_absmax_is_what_hooks_on_transformers_see(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("absmax")
    lines = dict(line.split() for line in capsys.readouterr().out.splitlines())
    expected: dict[str, float] = {}
    model = oracle()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def hook(_: nn.Module, given: Any, path: str = path) -> None:
                expected[path] = float(given[0].abs().max())

            module.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(ids_of(found["llm"], found["answer"]))
    assert set(lines) == set(expected)
    assert len(lines) == 22
    for path, value in expected.items():
        assert float(lines[path]) == pytest.approx(value, abs=2e-3), path


def test_rms_norm_eps_is_the_model_with_that_epsilon() -> None:
    found = run("rms_norm_eps")
    llm, answer = found["llm"], found["answer"]
    assert count_of(llm, "change_epsilon") == 7  # two a layer, and the last
    with torch.no_grad():
        logits = oracle(rms_norm_eps=found["NEW"])(ids_of(llm, answer)).logits[0]
    assert logits[-len(answer.token_ids) :].argmax(-1).tolist() == answer.token_ids
    assert answer.token_ids[:8] != complete(plain()).token_ids


def test_residual_is_the_hidden_state_of_transformers() -> None:
    found = run("residual")
    with torch.no_grad():
        states = oracle()(ids_of(found["llm"], found["answer"]), output_hidden_states=True)
    layer = states.hidden_states[2]  # behind the second of three layers
    torch.testing.assert_close(torch.from_numpy(found["rows"]), layer[0], rtol=1e-4, atol=1e-4)


def test_steering_adds_the_vector_for_one_request(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("steering")
    point, llm, vector = found["POINT"], found["llm"], found["vector"]
    first, second = capsys.readouterr().out.splitlines()
    assert first != second
    look = {"taps": [point], "tap_prompt": True}
    before = complete(llm, **look).taps[point]
    after = complete(llm, **look, steer={point: vector.tolist()}).taps[point]
    length = len(llm.get_tokenizer().encode(PROMPT))
    moved = (after - before)[:length]
    np.testing.assert_allclose(moved, np.tile(vector, (length, 1)), rtol=1e-3, atol=1e-3)


def test_int8_weights_are_held_and_close_to_dense() -> None:
    found = run("int8_linear")
    assert len((EXAMPLES / "int8_linear.py").read_text().splitlines()) < 40
    llm = found["llm"]
    weights = llm.artifact.manifest["weights"].values()
    held = [w for w in weights if w["dtype"] == "int8"]
    layers = llm.artifact.manifest["model"]["num_layers"]
    assert len(held) == count_of(llm, "int8_linear") == 4 * layers
    exact, rounded = (prompt_logprobs(made) for made in (plain(), llm))
    difference = np.abs(exact - rounded).max()
    assert 0 < difference < 0.1


def prompt_logprobs(llm: LLM) -> np.ndarray[Any, np.dtype[np.float64]]:
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate(PROMPT, params)
    assert output.prompt_logprobs is not None
    first = [next(iter(p.values())).logprob for p in output.prompt_logprobs if p]
    return np.array(first)
