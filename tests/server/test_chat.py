"""/v1/chat/completions through the official client."""

import asyncio

import openai
import pytest

from tests.server.conftest import Running, Starter, run
from tests.server.fake import REPLY

ASK = [{"role": "user", "content": "hi"}]


def test_reply(client: openai.OpenAI, running: Running) -> None:
    reply = client.chat.completions.create(model="fake", messages=ASK)
    choice = reply.choices[0]
    assert (choice.message.content, choice.message.role) == (REPLY, "assistant")
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
    assert reply.object == "chat.completion"
    assert reply.model == "fake"
    assert reply.id.startswith("chatcmpl-")
    prompt = len("user: hi\nassistant:")
    assert reply.usage.prompt_tokens == prompt
    assert reply.usage.completion_tokens == len(REPLY.encode()) + 1
    assert reply.usage.total_tokens == prompt + len(REPLY.encode()) + 1
    assert reply.usage.prompt_tokens_details.cached_tokens == 2
    request = running.engine.requests[-1]
    assert bytes(request.prompt_token_ids) == b"user: hi\nassistant:"
    assert request.params.max_tokens == 1000 - prompt
    assert request.eos_token_ids == [256]


def test_stream(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="fake", messages=ASK, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == REPLY
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].choices[0].delta.content is None
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)
    assert not any("�" in (chunk.choices[0].delta.content or "") for chunk in chunks)


def test_stream_bytes(running: Running) -> None:
    """The very lines: data, blank, [DONE] last; usage left out unless asked for."""
    with running.client().chat.completions.with_streaming_response.create(
        model="fake", messages=ASK, stream=True, max_tokens=2
    ) as reply:
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = reply.read().split(b"\n\n")
    assert events.pop() == b""
    assert events.pop() == b"data: [DONE]"
    assert all(event.startswith(b"data: {") and b"\n" not in event for event in events)
    assert not any(b'"usage"' in event for event in events)


@pytest.mark.parametrize("continuous", [False, True])
def test_stream_usage(client: openai.OpenAI, continuous: bool) -> None:
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    chunks = list(
        client.chat.completions.create(
            model="fake", messages=ASK, stream=True, stream_options=options, max_tokens=3
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 3
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 2
    usages = [chunk.usage for chunk in chunks[:-1]]
    if not continuous:
        assert usages == [None] * len(usages)
        return
    counts = [usage.completion_tokens for usage in usages]
    assert counts == sorted(counts)
    assert (counts[0] >= 1, counts[-1]) == (True, 3)


@pytest.mark.parametrize("stream", [False, True])
def test_n(client: openai.OpenAI, stream: bool) -> None:
    reply = client.chat.completions.create(model="fake", messages=ASK, n=3, stream=stream)
    if not stream:
        assert [choice.message.content for choice in reply.choices] == [REPLY] * 3
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        assert reply.usage.completion_tokens == 3 * (len(REPLY.encode()) + 1)
        return
    texts, ends = ["", "", ""], set()
    for chunk in reply:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            ends.add((choice.index, choice.finish_reason))
    assert texts == [REPLY] * 3
    assert ends == {(0, "stop"), (1, "stop"), (2, "stop")}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("included", [False, True])
def test_stop_string(client: openai.OpenAI, running: Running, stream: bool, included: bool) -> None:
    """Neither form shows a piece of the stop string; the engine is told to stop that one."""
    reply = client.chat.completions.create(
        model="fake",
        messages=ASK,
        stop=["lo, w", "zzz"],
        stream=stream,
        extra_body={"include_stop_str_in_output": included},
    )
    if stream:
        chunks = list(reply)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        last = chunks[-1].choices[0]
    else:
        last = reply.choices[0]
        text = last.message.content
    assert text == ("Hello, w" if included else "Hel")
    assert last.finish_reason == "stop"
    assert last.stop_reason == "lo, w"
    assert (running.engine.requests[-1].request_id, 0) in running.engine.aborted


def test_stop_token(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="fake", messages=ASK, extra_body={"stop_token_ids": [ord(",")]}
    )
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].stop_reason == ord(",")
    assert reply.choices[0].message.content == "Hello"


def test_length(client: openai.OpenAI) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        reply = client.chat.completions.create(model="fake", messages=ASK, **{field: 4})
        assert reply.choices[0].message.content == "Hell"
        assert reply.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: openai.OpenAI, stream: bool) -> None:
    reply = client.chat.completions.create(
        model="fake", messages=ASK, logprobs=True, top_logprobs=2, max_tokens=9, stream=stream
    )
    parts = list(reply) if stream else [reply]
    tokens = [
        token
        for part in parts
        if part.choices[0].logprobs
        for token in part.choices[0].logprobs.content
    ]
    assert [token.bytes for token in tokens] == [[byte] for byte in REPLY.encode()[:9]]
    assert tokens[0].token == "H"
    assert tokens[8].token == "�"  # half of the ö; its byte is told exactly
    assert tokens[0].logprob == -1.5
    assert [(top.token, top.logprob) for top in tokens[0].top_logprobs] == [
        ("a", -0.5),
        ("b", -1.5),
    ]


def test_logprobs_without_top(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="fake", messages=ASK, logprobs=True, max_tokens=1)
    assert reply.choices[0].logprobs.content[0].top_logprobs == []


def test_params_reach_the_engine(client: openai.OpenAI, running: Running) -> None:
    client.chat.completions.create(
        model="org/fake",
        messages=ASK,
        temperature=0.5,
        top_p=0.75,
        seed=7,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={"65": -100},
        user="u",
        store=True,
        metadata={"a": "b"},
        parallel_tool_calls=True,
        service_tier="auto",
        response_format={"type": "text"},
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "min_tokens": 2,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "cache_salt": "s",
            "priority": 3,
            "max_tokens": 20,
        },
    )
    request = running.engine.requests[-1]
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.75, 5, 0.1)
    assert (params.presence_penalty, params.frequency_penalty) == (0.25, -0.5)
    assert (params.repetition_penalty, params.seed) == (1.2, 7)
    assert params.logit_bias == {65: -100.0}
    assert (params.min_tokens, params.max_tokens) == (2, 20)
    assert params.ignore_eos
    assert not params.skip_special_tokens
    assert (request.cache_salt, request.priority) == ("0:s", 3)


def test_defaults_of_the_checkpoint(start: Starter) -> None:
    defaults = {"temperature": 0.0, "top_p": 0.9, "top_k": 20.0, "max_new_tokens": 3.0}
    server = start(model={"defaults": defaults})
    client = server.client()
    reply = client.chat.completions.create(model="fake", messages=ASK)
    assert reply.usage.completion_tokens == 3
    params = server.engine.requests[-1].params
    assert (params.temperature, params.top_p, params.top_k) == (0.0, 0.9, 20)
    client.chat.completions.create(model="fake", messages=ASK, temperature=1, top_p=1)
    params = server.engine.requests[-1].params
    assert (params.temperature, params.top_p) == (1.0, 1.0)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=ASK, n=2)
    assert caught.value.param == "n"


def test_messages_to_template(client: openai.OpenAI, running: Running) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    client.chat.completions.create(
        model="fake",
        messages=[
            {"role": "developer", "content": parts},
            {"role": "assistant", "content": None, "refusal": "no", "tool_calls": [call]},
            {"role": "tool", "content": "4", "tool_call_id": "1"},
        ],
        max_tokens=1,
        extra_body={
            "chat_template_kwargs": {"enable_thinking": False},
            "add_generation_prompt": False,
        },
    )
    prompt = bytes(running.engine.requests[-1].prompt_token_ids).decode()
    assert prompt == "developer: one\ntwo\nassistant: no\ntool: 4 enable_thinking=False"


def test_continue_final_message(client: openai.OpenAI, running: Running) -> None:
    client.chat.completions.create(
        model="fake",
        messages=[*ASK, {"role": "assistant", "content": "Well"}],
        max_tokens=1,
        reasoning_effort="low",
        extra_body={"continue_final_message": True},
    )
    prompt = bytes(running.engine.requests[-1].prompt_token_ids).decode()
    assert prompt == "user: hi\nassistant: Well reasoning_effort=low"


def test_long_text(client: openai.OpenAI, running: Running) -> None:
    """Long texts are tokenized off the event loop, to the same end."""
    with pytest.raises(openai.BadRequestError, match="8000 input tokens"):
        client.completions.create(model="fake", prompt="x" * 8000)


def test_reply_can_be_sent_back(client: openai.OpenAI) -> None:
    """What the client's own objects dump is accepted as a message."""
    reply = client.chat.completions.create(model="fake", messages=ASK, max_tokens=2)
    messages = [*ASK, reply.choices[0].message.model_dump(), *ASK]
    assert client.chat.completions.create(model="fake", messages=messages).choices


def test_fifty_clients_at_once(running: Running) -> None:
    """Streams and whole replies, interleaved; each gets its own answer."""

    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        messages = [{"role": "user", "content": str(number)}]
        if number % 2:
            reply = await client.chat.completions.create(model="fake", messages=messages)
            return str(reply.choices[0].message.content)
        stream = await client.chat.completions.create(model="fake", messages=messages, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def everyone() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="x") as client:
            return await asyncio.gather(*(one(client, i) for i in range(50)))

    assert run(everyone()) == [REPLY] * 50
    assert len(running.engine.requests) == 50
    assert running.call(lambda: running.app.state.fxlm.bridge.num_live) == 0
