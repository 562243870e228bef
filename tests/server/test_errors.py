"""Every refusal: its status, the field it names, OpenAI's shape."""

import json
import socket
from typing import Any

import httpx2
import openai
import pytest

from fxlm.server.limits import Limits
from tests.server.conftest import WAIT_S, Running, Starter
from tests.server.fake import PlainTemplate

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "fake", "prompt": "hi"}
JSON = {"Content-Type": "application/json"}


def post(server: Running, path: str, body: Any, **headers: str) -> httpx2.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return server.http.post(path, content=data, headers=JSON | headers)


def check(reply: httpx2.Response, status: int, param: str | None, code: str | None = None) -> str:
    """The error object, exactly; gives its message."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param, body
    assert code is None or body["error"]["code"] == code, body
    assert body["error"]["message"]
    return str(body["error"]["message"])


# What is wrong in both endpoints: fields to add, and the field that the error names.
COMMON: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": "2"}, "n"),
    ({"n": True}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": 2, "temperature": 0}, "n"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2**40}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"seed": 2**64}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 100000}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": "x" * 1025}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop_token_ids": [257]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [1] * 257}, "stop_token_ids"),
    ({"logit_bias": {"257": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": "x"}}, "logit_bias[...]"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"stream": "yes"}, "stream"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
    ({"tools": []}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"best_of": 2}, "best_of"),
    ({"best_of": True}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"bad_words": ["x"]}, "bad_words"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"temprature": 1}, "temprature"),
]

ONLY_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 100000}, "max_completion_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"logprobs": 5}, "logprobs"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"echo": True}, "echo"),
    ({"prompt": "x"}, "prompt"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "contents": "x"}]}, "messages[0].contents"),
    ({"messages": [{"role": "forbidden", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]},
     "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
     "messages[0].content[0].type"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
     "messages[0].tool_calls[0].function"),
    ({"messages": [{"role": "assistant", "content": "", "function_call": {}}]},
     "messages[0].function_call"),
    ({"messages": [{"role": "user", "content": "x"}] * 4097}, "messages"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
]  # fmt: skip

ONLY_TEXT: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"echo": True, "logprobs": 1, "stream": True}, "echo"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"max_completion_tokens": 1}, "max_completion_tokens"),
    ({"messages": []}, "messages"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [[1], 2]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [257]}, "prompt"),
    ({"prompt": [2**70]}, "prompt"),
    ({"prompt": [1.5]}, "prompt[0]"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": ["a"] * 1025}, "prompt"),
    ({"prompt": ["a"] * 600, "n": 2}, "prompt"),
]


@pytest.mark.parametrize(("fields", "param"), COMMON + ONLY_CHAT)
def test_chat_field(running: Running, fields: dict[str, Any], param: str) -> None:
    check(post(running, "/v1/chat/completions", CHAT | fields), 400, param)
    assert running.engine.requests == []


@pytest.mark.parametrize(("fields", "param"), COMMON + ONLY_TEXT)
def test_completion_field(running: Running, fields: dict[str, Any], param: str) -> None:
    check(post(running, "/v1/completions", TEXT | fields), 400, param)
    assert running.engine.requests == []


def test_misspelt_field_gets_a_guess(running: Running) -> None:
    said = check(post(running, "/v1/completions", TEXT | {"max_token": 1}), 400, "max_token")
    assert "Did you mean max_tokens?" in said
    messages = [{"role": "user", "contnt": "x"}]
    said = check(
        post(running, "/v1/chat/completions", {"messages": messages}), 400, "messages[0].contnt"
    )
    assert "Did you mean content?" in said


def test_missing_field(running: Running) -> None:
    check(post(running, "/v1/chat/completions", {"model": "fake"}), 400, "messages")
    check(post(running, "/v1/completions", {"model": "fake"}), 400, "prompt")


def test_null_is_not_given(running: Running) -> None:
    names = ("n", "temperature", "stop", "stream", "stream_options", "tools", "logit_bias", "seed")
    body = TEXT | dict.fromkeys(names)
    assert post(running, "/v1/completions", body).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nonsense", b"[]", b'"x"', b"\xff\xfe", b'{"prompt": "\xff"}',
     b'{"prompt": "\\ud800"}', b'{"prompt": "\\ud800x"}', b'{"user":' + b"[" * 60000],
)  # fmt: skip
def test_not_json(running: Running, body: bytes) -> None:
    check(post(running, "/v1/completions", body), 400, None, "invalid_json")


@pytest.mark.parametrize(
    ("body", "field", "value"),
    [(b'{"prompt": "x", "steer": {"mid": [0.5, NaN]}}', "steer.mid[1]", "NaN"),
     (b'{"prompt": "x", "top_p": -Infinity}', "top_p", "-Infinity")],
)  # fmt: skip
def test_a_number_that_json_lacks_is_named(
    running: Running, body: bytes, field: str, value: str
) -> None:
    said = check(post(running, "/v1/completions", body), 400, field, "invalid_json")
    assert f"{field}={value} cannot be used" in said


def test_nested_too_deep(running: Running) -> None:
    deep: Any = "x"
    for _ in range(100):
        deep = [deep]
    fields = {"chat_template_kwargs": {"a": deep}}
    check(post(running, "/v1/chat/completions", CHAT | fields), 400, "chat_template_kwargs")


def test_context_length(running: Running) -> None:
    """A prompt over the context, and one that leaves too little, tell both counts."""
    said = check(post(running, "/v1/completions", {"prompt": "x" * 1000}), 400, "prompt")
    assert "maximum context length is 1000 tokens" in said
    assert "1000 input tokens" in said
    body = {"prompt": "x" * 990, "max_tokens": 11}
    said = check(
        post(running, "/v1/completions", body), 400, "max_tokens", "context_length_exceeded"
    )
    assert "(11 > 1000 - 990)" in said
    assert post(running, "/v1/completions", body | {"max_tokens": 10}).status_code == 200
    messages = [{"role": "user", "content": "x" * 5000}]
    check(post(running, "/v1/chat/completions", {"messages": messages}), 400, "messages")


def test_default_length_fits_the_context(running: Running) -> None:
    """Nobody asked for 16 tokens, so 5 that fit are no error."""
    reply = post(running, "/v1/completions", {"prompt": "x" * 995})
    assert reply.json()["usage"]["completion_tokens"] == 5


def test_unknown_model(running: Running, client: openai.OpenAI) -> None:
    body = CHAT | {"model": "gpt-9"}
    said = check(post(running, "/v1/chat/completions", body), 404, "model", "model_not_found")
    assert "fake, org/fake" in said
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake", "org/fake"]
    assert client.models.retrieve("fake").max_model_len == 1000
    reply = client.completions.create(model="org/fake", prompt="x", max_tokens=1)
    assert reply.model == "org/fake"


def test_unknown_route_and_method(running: Running) -> None:
    for path in ("/", "/v1", "/v1/nothing", "/health/", "/v1/completions/", "//health"):
        check(running.http.get(path), 404, None, "unknown_url")
    reply = running.http.get("/v1/completions")
    check(reply, 405, None, "method_not_allowed")
    assert reply.headers["allow"] == "POST"
    check(post(running, "/health", {}), 405, None, "method_not_allowed")


def test_body_size(running: Running, client: openai.OpenAI) -> None:
    """Told by its length, and told by its bytes when no length was declared."""
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="fake", prompt="x" * (1 << 20))
    assert caught.value.status_code == 413
    reply = running.http.post(
        "/v1/completions",
        content=(b"x" * 65536 for _ in range(17)),
        headers=JSON,
    )
    check(reply, 413, None, "request_too_large")
    assert client.completions.create(model="fake", prompt="x", max_tokens=1).choices


def test_slow_body(start: Starter) -> None:
    """A body that stops on its way is not waited for forever."""
    server = start(limits=Limits(body_seconds=0.01))
    host, port = server.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\n"
        "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        connection.sendall(head.encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_header_size(running: Running) -> None:
    headers = {f"x-{number}": "y" * 1000 for number in range(70)}
    check(running.http.get("/health", headers=headers), 431, None, "headers_too_large")


def test_content_type(running: Running) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = running.http.post("/v1/completions", content=b"{}", headers={"Content-Type": kind})
        check(reply, 415, None, "unsupported_media_type")
    kind = "application/json; charset=utf-8"
    reply = post(running, "/v1/completions", TEXT, **{"Content-Type": kind})
    assert reply.status_code == 200


def test_no_template(start: Starter) -> None:
    server = start(model={"chat_template": None})
    check(post(server, "/v1/chat/completions", CHAT), 400, "messages", "no_chat_template")


def test_request_id(running: Running) -> None:
    reply = post(running, "/v1/completions", TEXT, **{"X-Request-Id": "mine-1"})
    assert reply.headers.get_list("x-request-id") == ["mine-1"]
    for bad in ("", "x" * 200, "a\tb"):
        reply = post(running, "/v1/completions", TEXT, **{"X-Request-Id": bad})
        assert len(reply.headers["x-request-id"]) == 32
    assert len(post(running, "/v1/completions", b"").headers["x-request-id"]) == 32


def test_our_fault_is_a_500(start: Starter, caplog: pytest.LogCaptureFixture) -> None:
    """And the client learns no detail, whole or in a stream."""

    class Broken(PlainTemplate):
        def render(self, *_: Any, **__: Any) -> str:
            raise ZeroDivisionError("secret detail")

    server = start(model={"chat_template": Broken()})
    for stream in (False, True):
        reply = post(server, "/v1/chat/completions", CHAT | {"stream": stream})
        said = check(reply, 500, None, "internal_error")
        assert "secret" not in said
    assert "secret detail" in caplog.text
