"""Random bodies and headers: never a 500, and the server answers afterwards."""

import json
from typing import Any
from urllib.parse import quote

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxlm.server.protocol import ChatRequest, CompletionRequest, Message
from tests.server.conftest import Running
from tests.server.test_errors import JSON, TEXT

FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

WORDS = st.sampled_from(
    ["", "a", "text", "user", "assistant", "system", "fake", "\x00", "�", "\ud800", "\U0001f600",
     "{{ 1 }}", "type", "role", "content", "x" * 2000]
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, 2**64, 2**100, -(2**63) - 1]),
    st.floats(),
)
JSONS = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(WORDS | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": WORDS},
    optional={name: JSONS for name in Message.__struct_fields__ if name != "role"},
)


def body_of(kind: type[ChatRequest] | type[CompletionRequest]) -> st.SearchStrategy[Any]:
    """Some known fields with any values, some of them likely, and now and then unknown ones."""
    fields: dict[str, st.SearchStrategy[Any]] = dict.fromkeys(kind.__struct_fields__, JSONS)
    fields["stream"] = st.booleans() | JSONS
    fields["prompt"] = JSONS | st.lists(st.integers(-1, 300), max_size=4)
    fields["messages"] = JSONS | st.lists(MESSAGE, max_size=3)
    fields["logit_bias"] = JSONS | st.dictionaries(st.sampled_from(["1", "-1", "x"]), NUMBERS)
    fields["max_tokens"] = st.integers(0, 5) | JSONS
    known = st.sets(st.sampled_from(sorted(kind.__struct_fields__)), max_size=4)
    return known.flatmap(
        lambda names: st.fixed_dictionaries({name: fields[name] for name in sorted(names)})
    )


def send(server: Running, path: str, body: Any) -> None:
    """Any answer but a 500; what streams ends by its rules."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode("utf-8", "surrogatepass")
    reply = server.http.post(path, content=data, headers=JSON)
    assert reply.status_code in (200, 400, 404, 503), (reply.status_code, reply.text)
    if reply.headers["content-type"].startswith("text/event-stream"):
        assert reply.text.endswith("data: [DONE]\n\n"), reply.text[-300:]
    elif reply.status_code != 200:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


@FUZZ
@given(body=body_of(ChatRequest), more=JSONS)
def test_chat(running: Running, body: dict[str, Any], more: Any) -> None:
    send(running, "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]} | body)
    send(running, "/v1/chat/completions", body)
    send(running, "/v1/chat/completions", more)


@FUZZ
@given(body=body_of(CompletionRequest), more=st.binary(max_size=50))
def test_completions(running: Running, body: dict[str, Any], more: bytes) -> None:
    send(running, "/v1/completions", TEXT | body)
    send(running, "/v1/completions", body)
    send(running, "/v1/completions", more)


@FUZZ
@given(
    path=st.text(st.characters(max_codepoint=0x2FF), max_size=12),
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"]),
    name=st.sampled_from(["authorization", "content-type", "x-request-id", "accept", "origin"]),
    value=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20),
)
def test_paths_and_headers(running: Running, path: str, method: str, name: str, value: str) -> None:
    reply = running.http.request(
        method, "/" + quote(path, safe="/"), headers={name: value}, content=b"{}"
    )
    assert reply.status_code < 500, (reply.status_code, reply.text)


def test_still_serving(running: Running) -> None:
    assert running.http.post("/v1/completions", json=TEXT).status_code == 200
