"""`fxlm serve` as a process: the real engine behind the real server, by the official client."""

from __future__ import annotations

import base64
import re
import runpy
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from openai import BadRequestError, OpenAI

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "taps_over_http.py"
COMMAND = (
    sys.executable, "-m", "fxlm", "serve", "bundled-draft", "--enforce-eager", "--port", "0",
    "--dtype", "float32", "--max-num-seqs", "8", "--shutdown-timeout", "2",
    "--tap", "model.layers.0", "--steer", "model.layers.0",
)  # fmt: skip


@pytest.fixture(scope="module")
def client() -> Iterator[OpenAI]:
    with serving() as made:
        yield made


@contextmanager
def serving(*flags: str) -> Iterator[OpenAI]:
    """A client of a server that is up, and ends as it should."""
    with subprocess.Popen((*COMMAND, *flags), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = ""
        for line in process.stdout:  # ends with the process, so a failed start is no hang
            found = re.match(r"Serving bundled-draft on (http://127\.0\.0\.1:\d+)", line)
            if found:
                url = found[1]
                break
        assert url, f"the server ended with status {process.wait()}"
        with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
            yield made
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0


def chat(client: OpenAI, question: str, **options: object) -> str:
    answer = client.chat.completions.create(
        model="bundled-draft",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=16,
        **options,  # type: ignore[call-overload]
    )
    return str(answer.choices[0].message.content)


def test_streaming_gives_the_same_text(client: OpenAI) -> None:
    whole = chat(client, "What is 2 + 3?")
    stream = client.chat.completions.create(
        model="bundled-draft",
        messages=[{"role": "user", "content": "What is 2 + 3?"}],
        temperature=0,
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


def test_many_at_once_answer_as_one_alone(client: OpenAI) -> None:
    questions = [f"What is {i} + 3?" for i in range(12)]
    alone = [chat(client, q) for q in questions]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(lambda q: chat(client, q), questions)) == alone


def test_a_repeated_prompt_is_found_in_the_cache(client: OpenAI) -> None:
    ids = list(range(10, 60))
    options = {"model": "bundled-draft", "prompt": ids, "max_tokens": 2, "temperature": 0}
    client.completions.create(**options)
    again = client.completions.create(**options)
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == 48


def test_logprobs_and_n(client: OpenAI) -> None:
    answer = client.completions.create(
        model="bundled-draft", prompt="import os", max_tokens=3, n=2, logprobs=2, seed=1
    )
    assert len(answer.choices) == 2
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.tokens or []) == 3


def test_drafts_change_nothing_but_the_metrics(client: OpenAI) -> None:
    asked = {
        "model": "bundled-draft", "prompt": "a b c a b c a b c a b", "max_tokens": 24, "n": 2,
        "seed": 3, "temperature": 0.5, "logprobs": 1, "frequency_penalty": -0.5,
    }  # fmt: skip
    config = '{"method": "ngram", "num_speculative_tokens": 3, "adaptive": false}'
    with serving("--speculative-config", config) as drafting:
        found = [made.completions.create(**asked) for made in (client, drafting)]
        stream = drafting.completions.create(**asked, stream=True)
        texts = ["", ""]
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        metrics = httpx.get(str(drafting.base_url).replace("/v1/", "/metrics")).text
    plain, drafted = ([(c.text, c.logprobs) for c in answer.choices] for answer in found)
    assert plain == drafted
    assert texts == [text for text, _ in plain]
    assert found[0].usage == found[1].usage
    accepted = re.search(r"vllm:spec_decode_num_accepted_tokens_total\{.*\} (.+)", metrics)
    assert accepted is not None
    assert float(accepted[1]) > 0


def test_taps_and_steering_over_the_api(client: OpenAI) -> None:
    point = "model.layers.0"
    options = {"model": "bundled-draft", "prompt": "import os", "max_tokens": 3, "temperature": 0}
    whole = client.completions.create(**options, extra_body={"taps": [point], "ignore_eos": True})
    (choice,) = whole.choices
    assert choice.model_extra is not None
    rows = tap_of(choice.model_extra["taps"][point])
    assert len(rows) == 3
    stream = client.completions.create(
        **options, stream=True, extra_body={"taps": [point], "ignore_eos": True}
    )
    parts = [c.choices[0].model_extra or {} for c in stream if c.choices]
    found = [row for part in parts if "taps" in part for row in tap_of(part["taps"][point])]
    assert found == rows
    steered = client.completions.create(
        **options,
        extra_body={"taps": [point], "steer": {point: [1.0] * len(rows[0])}, "ignore_eos": True},
    )
    assert steered.choices[0].model_extra is not None
    moved = tap_of(steered.choices[0].model_extra["taps"][point])
    assert all(abs(new - old - 1.0) < 1e-3 for new, old in zip(moved[0], rows[0], strict=True))


def test_the_example_of_the_page(client: OpenAI) -> None:
    found = runpy.run_path(str(EXAMPLE), run_name="example")
    plain = found["hidden_states"](client)
    moved = found["hidden_states"](client, steer={found["POINT"]: [0.5] * plain.shape[1]})
    assert plain.shape[1] == moved.shape[1] == 64
    assert abs(moved[0] - plain[0] - 0.5).max() < 1e-4


def test_an_unknown_point_is_a_400_that_names_it(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match=r"taps has no point 'nowhere'") as error:
        client.completions.create(
            model="bundled-draft", prompt="import os", extra_body={"taps": ["nowhere"]}
        )
    assert error.value.param == "taps"


def tap_of(tapped: dict[str, Any]) -> list[tuple[float, ...]]:
    """Rows of a tap in a JSON reply."""
    data, (_, size) = base64.b64decode(tapped["data"]), tapped["shape"]
    return list(struct.iter_unpack(f"<{size}f", data))
