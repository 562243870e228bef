"""Clients that leave, engines that fail or die, queues that are full, servers that stop."""

import socket
import threading
from pathlib import Path

import httpx2
import openai
import pytest

from tests.server.conftest import WAIT_S, Running, Starter
from tests.server.test_errors import CHAT, JSON, TEXT, check, post

ASK = [{"role": "user", "content": "hi"}]


def leave_early(server: Running, body: dict[str, object]) -> None:
    """Send a request, wait until the engine has it, close the connection."""
    server.engine.hold = True
    host, port = server.url.removeprefix("http://").split(":")
    data = httpx2.Request("POST", server.url, json=body).content
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        connection.sendall(head.encode() + data)
        server.wait(lambda: len(server.engine.requests) == 1)
        if body.get("stream"):
            assert b"200 OK" in connection.recv(4096)


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_aborts(running: Running, stream: bool) -> None:
    leave_early(running, TEXT | {"stream": stream, "n": 2})
    running.wait(lambda: bool(running.engine.aborted))
    assert running.engine.aborted == [(running.engine.requests[0].request_id, -1)]
    bridge = running.app.state.fxlm.bridge
    running.wait(lambda: bridge.num_live == 0)
    assert 'finished_reason="abort"' in running.http.get("/metrics").text


def test_disconnect_before_the_first_token(running: Running) -> None:
    running.engine.hold_first = True
    leave_early(running, TEXT)
    running.wait(lambda: bool(running.engine.aborted))


def test_closing_the_clients_stream_aborts(running: Running, client: openai.OpenAI) -> None:
    running.engine.hold = True
    with client.chat.completions.create(model="fake", messages=ASK, stream=True) as stream:
        next(iter(stream))
    running.wait(lambda: bool(running.engine.aborted))


def test_two_hundred_disconnects(running: Running) -> None:
    for _ in range(200):
        running.engine.requests.clear()
        leave_early(running, TEXT)
    running.wait(lambda: len(running.engine.aborted) == 200)
    running.engine.hold = False
    assert post(running, "/v1/completions", TEXT).status_code == 200


def test_engine_death(start: Starter, caplog: pytest.LogCaptureFixture) -> None:
    """Running requests, later ones and /health all tell the reason; then the server ends."""
    server = start()
    server.engine.hold = True
    client = server.client()
    stream = client.chat.completions.create(model="fake", messages=ASK, stream=True)
    assert next(iter(stream)).choices[0].delta.role == "assistant"
    assert server.http.get("/health").status_code == 200
    server.call(lambda: server.engine.die("out of luck; its last lines:\nsecret"))
    with pytest.raises(openai.APIError, match="out of luck"):
        list(stream)
    reply = post(server, "/v1/completions", TEXT)
    assert "out of luck" in check(reply, 503, None, "engine_dead")
    assert reply.headers["retry-after"] == "10"
    said = check(server.http.get("/health"), 503, None, "unhealthy")
    assert said == "Not healthy: out of luck."
    assert caplog.text.count("secret") == 1  # what it printed is for the operator's log alone
    assert server.http.get("/metrics").status_code == 200
    server.call(server.engine.gone.set)
    server.thread.join(WAIT_S)
    assert not server.thread.is_alive()
    assert server.server.lost == "out of luck; its last lines:\nsecret"


def test_engine_death_before_the_first_token(start: Starter) -> None:
    """No token was sent yet, so the status can still tell, for streams too."""
    server = start()
    server.engine.hold_first = True
    replies: list[httpx2.Response] = []

    def ask(stream: bool) -> None:
        replies.append(post(server, "/v1/chat/completions", CHAT | {"stream": stream}))

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
    for thread in threads:
        thread.start()
    server.wait(lambda: len(server.engine.requests) == 2)
    server.call(lambda: server.engine.die("gone"))
    for thread in threads:
        thread.join(WAIT_S)
    for reply in replies:
        check(reply, 503, None, "engine_dead")


def test_request_that_the_engine_fails(running: Running) -> None:
    running.engine.fail_after = 0
    for stream in (False, True):
        reply = post(running, "/v1/completions", TEXT | {"stream": stream})
        assert "out of blocks" in check(reply, 503, None, "engine_error")
    running.engine.fail_after = 3
    reply = post(running, "/v1/completions", TEXT | {"stream": True})
    assert reply.status_code == 200
    last = reply.text.strip().split("\n\n")[-1]
    assert last.startswith('data: {"error":{"message":')
    assert "out of blocks" in last
    assert "[DONE]" not in reply.text


def test_full_queue(start: Starter) -> None:
    server = start(model={"max_num_seqs": 2}, max_num_queued_reqs=1)
    server.engine.hold = True
    client = server.client()
    streams = [
        client.completions.create(model="fake", prompt="x", stream=True, n=n) for n in (1, 2)
    ]
    reply = post(server, "/v1/completions", TEXT)
    assert "3 completions run or wait and 3 are allowed" in check(reply, 503, None, "queue_full")
    assert reply.headers["retry-after"] == "1"
    assert post(server, "/v1/completions", TEXT | {"stream": True}).status_code == 503
    assert "vllm:admission_rejections_total" in server.http.get("/metrics").text
    streams[0].close()
    server.wait(lambda: bool(server.engine.aborted))
    server.engine.hold = False
    assert post(server, "/v1/completions", TEXT).status_code == 200
    assert server.http.get("/health").status_code == 200


def test_drain_waits_for_running_requests(start: Starter) -> None:
    server = start(shutdown_timeout_s=30)
    server.engine.hold = True
    stream = server.client().completions.create(model="fake", prompt="x", stream=True)
    events = iter(stream)
    assert next(events).choices[0].text == "H"
    server.server.should_exit = True
    server.wait(lambda: server.app.state.fxlm.draining)
    with pytest.raises(httpx2.TransportError):
        server.http.post("/v1/completions", json=TEXT)
    server.call(lambda: setattr(server.engine, "hold", False))
    assert list(events)[-1].choices[0].finish_reason == "stop"
    server.stop()


def test_drain_ends_with_an_error_event(start: Starter) -> None:
    server = start(shutdown_timeout_s=0)
    server.engine.hold = True
    stream = server.client().completions.create(model="fake", prompt="x", stream=True)
    server.server.should_exit = True
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    server.stop()
    assert server.engine.aborted


def test_draining_refuses_on_open_connections(running: Running) -> None:
    state = running.app.state.fxlm
    state.draining = True
    try:
        check(post(running, "/v1/completions", TEXT), 503, None, "shutting_down")
        check(running.http.get("/health"), 503, None, "unhealthy")
    finally:
        state.draining = False


def test_keep_alive_after_an_error(running: Running) -> None:
    """An error does not cost the connection."""
    with httpx2.Client(base_url=running.url, headers=JSON) as client:
        for _ in range(3):
            assert client.post("/v1/completions", content=b"{").status_code == 400
            assert client.post("/v1/completions", json=TEXT).status_code == 200


def test_unix_socket(start: Starter, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    start(uds=path)
    with httpx2.Client(transport=httpx2.HTTPTransport(uds=path)) as client:
        assert client.post("http://any/v1/completions", json=TEXT).status_code == 200
