"""/v1/completions through the official client."""

import openai
import pytest

from tests.server.conftest import Running
from tests.server.fake import REPLY


def test_text(client: openai.OpenAI, running: Running) -> None:
    reply = client.completions.create(model="fake", prompt="abc")
    assert reply.choices[0].text == REPLY
    assert reply.choices[0].finish_reason == "stop"
    assert (reply.object, reply.id[:5]) == ("text_completion", "cmpl-")
    assert reply.usage.prompt_tokens == 3
    assert running.engine.requests[-1].params.max_tokens == 16


def test_prompt_forms(client: openai.OpenAI, running: Running) -> None:
    """Text, texts, token ids, lists of them; choices are numbered prompt by prompt."""
    forms = {
        "text": ("ab", ["ab"]),
        "texts": (["ab", "c"], ["ab", "c"]),
        "ids": ([97, 98], ["ab"]),
        "lists": ([[97, 98], [99]], ["ab", "c"]),
    }
    for prompt, meant in forms.values():
        running.engine.requests.clear()
        reply = client.completions.create(model="fake", prompt=prompt, n=2, max_tokens=2)
        assert [bytes(r.prompt_token_ids).decode() for r in running.engine.requests] == meant
        assert {r.num_together for r in running.engine.requests} == {len(meant)}
        assert [choice.index for choice in reply.choices] == list(range(2 * len(meant)))
        assert {choice.text for choice in reply.choices} == {"He"}
        assert reply.usage.completion_tokens == 4 * len(meant)
        assert reply.usage.prompt_tokens == sum(map(len, meant))


@pytest.mark.parametrize("stream", [False, True])
def test_echo(client: openai.OpenAI, stream: bool) -> None:
    for prompt in ("abc", [97, 98, 99]):
        reply = client.completions.create(
            model="fake", prompt=prompt, echo=True, max_tokens=2, stream=stream
        )
        parts = list(reply) if stream else [reply]
        assert "".join(part.choices[0].text for part in parts) == "abcHe"
        assert parts[-1].choices[0].finish_reason == "length"


def test_echo_alone(client: openai.OpenAI) -> None:
    """max_tokens=0 with echo scores the prompt, as evaluation harnesses ask for."""
    reply = client.completions.create(
        model="fake", prompt="abc", echo=True, max_tokens=0, logprobs=1
    )
    choice = reply.choices[0]
    assert (choice.text, choice.finish_reason) == ("abc", "length")
    assert choice.logprobs.tokens == ["a", "b", "c"]
    assert choice.logprobs.token_logprobs == [None, -1.5, -1.5]
    assert choice.logprobs.text_offset == [0, 1, 2]
    assert reply.usage.completion_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: openai.OpenAI, stream: bool) -> None:
    reply = client.completions.create(
        model="fake", prompt="abc", logprobs=2, max_tokens=2, stream=stream
    )
    found = [part.choices[0].logprobs for part in (list(reply) if stream else [reply])]
    found = [logprobs for logprobs in found if logprobs]
    assert [t for part in found for t in part.tokens] == ["H", "e"]
    assert [t for part in found for t in part.token_logprobs] == [-1.5, -1.5]
    assert [t for part in found for t in part.text_offset] == [0, 1]
    assert found[0].top_logprobs[0] == {"a": -0.5, "b": -1.5, "H": -1.5}


def test_echo_with_logprobs(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="fake", prompt=["ab", "cd"], logprobs=0, echo=True, max_tokens=1, n=2
    )
    for choice, tokens in zip(reply.choices, ["abH", "abH", "cdH", "cdH"], strict=True):
        assert choice.logprobs.tokens == list(tokens)
        assert choice.logprobs.token_logprobs == [None, -1.5, -1.5]


def test_prompt_logprobs(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="fake", prompt="ab", max_tokens=1, extra_body={"prompt_logprobs": 1}
    )
    found = reply.choices[0].prompt_logprobs
    assert found[0] is None
    assert found[1] == {
        "97": {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
        "98": {"logprob": -1.5, "rank": 2, "decoded_token": "b"},
    }


def test_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="fake",
            prompt=["a", "b"],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    usage = chunks.pop()
    assert usage.choices == []
    assert usage.usage.completion_tokens == 2 * (len(REPLY.encode()) + 1)
    texts = ["", ""]
    for chunk in chunks:
        assert chunk.usage is None
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [REPLY] * 2
