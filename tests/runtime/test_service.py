"""The engine process over real sockets, with the fake model in it."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from fxlm.compiler.errors import EngineDead, InvalidRequest
from fxlm.runtime import transport
from fxlm.runtime.client import EngineClient
from fxlm.runtime.messages import Output, Ping, Submit, decode_to_engine, encode
from fxlm.runtime.request import Request
from fxlm.runtime.sampling_params import SamplingParams
from tests.runtime.fake import expect

ROOT = str(Path(__file__).parents[2])
FACTORY = "tests.runtime.fake:make_engine"
ENDLESS = {"max_model_len": 1_000_000, "num_blocks": 100_000, "block_size": 64}


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


class Shared:
    """One engine process for the tests that leave it as it was."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.client = self.runner.run(start(sizes=ENDLESS))

    def run(self, work: Callable[[EngineClient], Coroutine[Any, Any, None]]) -> None:
        self.runner.run(asyncio.wait_for(work(self.client), 60))


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    shared = Shared()
    yield shared
    with shared.runner:
        shared.runner.run(shared.client.close())


async def start(**kwargs: Any) -> EngineClient:
    return await EngineClient.start(FACTORY, kwargs, paths=[ROOT], show=lambda text: None)


def request(name: str, **params: Any) -> Request:
    options = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **params})
    return Request(request_id=name, prompt_token_ids=[1, 2, 3], params=options)


def endless(name: str) -> Request:
    return request(name, max_tokens=None)


async def collect(client: EngineClient, item: Request) -> dict[int, list[int]]:
    got: dict[int, list[int]] = {}
    async for output in client.stream(item):
        got.setdefault(output.index, []).extend(output.token_ids)
    return got


def test_requests_stream_side_by_side(shared: Shared) -> None:
    async def work(client: EngineClient) -> None:
        assert client.info.pid > 0
        assert client.info.max_model_len == 1_000_000
        items = [request(str(i), max_tokens=3 + i) for i in range(20)]
        items.append(request("n", n=3, temperature=1.0, seed=4))
        results = await asyncio.gather(*(collect(client, item) for item in items))
        for item, got in zip(items, results, strict=True):
            assert got == {i: expect(item, i) for i in range(item.params.n)}
        assert client.num_unfinished == 0
        assert (await client.ping()).finished["length"] == 23
        assert client.trouble() is None

    shared.run(work)


def test_leaving_a_stream_aborts_the_request(shared: Shared) -> None:
    async def work(client: EngineClient) -> None:
        stream = client.stream(endless("a"))
        assert (await anext(stream)).token_ids
        await stream.aclose()  # type: ignore[attr-defined]
        while (stats := await client.ping()).num_running:
            pass
        assert stats.kv_cache_usage == 0.0
        assert stats.finished["abort"] == 1
        news: asyncio.Queue[Output | Exception] = asyncio.Queue()
        client.submit(endless("b"), news.put_nowait)
        client.abort("b")
        client.abort("unknown")
        while not (isinstance(item := await news.get(), Output) and item.finish_reason):
            pass
        assert item.finish_reason == "abort"
        assert client.num_unfinished == 0
        while client.stats.num_running or client.stats.finished["abort"] < 2:
            await asyncio.sleep(0)  # the last change is told without being asked for

    shared.run(work)


def test_refused_requests_name_the_field_and_harm_nobody(shared: Shared) -> None:
    async def work(client: EngineClient) -> None:
        with pytest.raises(InvalidRequest, match="temperature") as caught:
            await collect(client, request("a", temperature=9.0))
        assert caught.value.param == "temperature"
        with pytest.raises(InvalidRequest, match="cannot be sent"):
            await collect(client, request("b", seed=2**70))
        assert await collect(client, request("a")) == {0: expect(request("a"))}

    shared.run(work)


def test_a_receiver_that_fails_keeps_nothing_from_the_others(shared: Shared) -> None:
    async def work(client: EngineClient) -> None:
        failures: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, what: failures.append(what))

        def broken(news: Output | Exception) -> None:
            raise ValueError(news)

        client.submit(request("broken"), broken)
        assert await collect(client, request("a")) == {0: expect(request("a"))}
        assert failures

    shared.run(work)


def test_garbage_on_the_socket_is_counted_and_ignored(shared: Shared) -> None:
    async def work(client: EngineClient) -> None:
        frames = [b"", b"\xc1", b"hello", encode(Ping(1))[:-1], msgspec.msgpack.encode({})]
        frames.append(msgspec.msgpack.encode({"type": "Submit", "request": {"params": 1}}))
        for frame in frames:
            client._send(frame)
        assert (await client.ping()).num_messages_bad == len(frames)
        assert await collect(client, request("a")) == {0: expect(request("a"))}

    shared.run(work)


def test_an_idle_engine_blocks_in_one_poll(shared: Shared) -> None:
    async def work(client: EngineClient) -> None:
        await collect(client, request("a"))
        before = await client.ping()
        for _ in range(10):
            after = await client.ping()
        assert after.num_polls - before.num_polls <= 10  # one a message, none in between
        assert after.num_steps == before.num_steps

    shared.run(work)


def test_a_killed_process_ends_every_request_with_its_reason() -> None:
    async def work() -> None:
        client = await start(sizes=ENDLESS)
        stream = client.stream(endless("a"))
        waiting = asyncio.create_task(collect(client, endless("b")))
        await anext(stream)
        os.kill(client.info.pid, signal.SIGKILL)

        async def rest() -> None:
            async for _ in stream:
                pass

        with pytest.raises(EngineDead, match="SIGKILL"):
            await asyncio.wait_for(rest(), 2)
        with pytest.raises(EngineDead, match="SIGKILL"):
            await asyncio.wait_for(waiting, 2)
        assert not client.is_alive
        assert "SIGKILL" in (client.trouble() or "")
        with pytest.raises(EngineDead, match="SIGKILL"):
            client.submit(request("c"), print)
        with pytest.raises(EngineDead, match="SIGKILL"):
            await client.ping()
        client.abort("a")
        await client.close()

    run(work())


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxlm.runtime.client.PATROL_S", 0.2)

    async def work() -> None:
        client = await EngineClient.start(
            FACTORY, {"sizes": ENDLESS}, paths=[ROOT], show=lambda text: None, hang_s=1.0
        )
        stream = client.stream(endless("a"))
        for _ in range(1000):  # while it works, nothing happens to it
            await anext(stream)
        os.kill(client.info.pid, signal.SIGSTOP)
        with pytest.raises(EngineDead, match="hangs: it has work, and did nothing for 1 s"):
            async for _ in stream:
                pass
        assert "hangs" in await client.ended()
        await client.close()

    run(work())


def test_a_fault_of_the_worker_is_told_in_its_own_words() -> None:
    async def work() -> None:
        client = await EngineClient.start(
            "tests.runtime.factories:make_faulty",
            paths=[ROOT],
            show=lambda text: None,
        )
        outputs: list[Output] = []
        async for output in client.stream(endless("a")):
            outputs.append(output)
        assert (outputs[-1].finish_reason, outputs[-1].message) == (
            "error",
            "RuntimeError: cable cut",
        )
        with pytest.raises(EngineDead, match="cable cut"):
            await client.ping()
        await client.close()

    run(work())


@pytest.mark.parametrize(
    ("factory", "words"),
    [("nowhere:make", "No module named 'nowhere'"), (FACTORY, "unexpected keyword argument")],
)
def test_an_engine_that_cannot_be_built_says_why(factory: str, words: str) -> None:
    async def work() -> None:
        with pytest.raises(EngineDead, match=words):
            await EngineClient.start(factory, {"nonsense": 1}, paths=[ROOT], show=lambda text: None)

    run(work())


def test_progress_and_last_lines_come_through() -> None:
    shown: list[str] = []

    async def work() -> None:
        with pytest.raises(EngineDead, match="exit code 7; its last lines:\nnearly") as caught:
            await EngineClient.start(
                "tests.runtime.factories:make_noise",
                paths=[ROOT],
                show=shown.append,
            )
        assert "there" in str(caught.value)

    run(work())
    assert "".join(shown) == "nearly\nthere\n"


def test_close_lets_running_requests_finish_and_refuses_new_ones() -> None:
    async def work() -> None:
        client = await start()
        running = asyncio.create_task(collect(client, request("a", max_tokens=50)))
        await client.ping()
        closing = asyncio.create_task(client.close(deadline_s=30.0))
        assert await running == {0: expect(request("a", max_tokens=50))}
        await closing
        await client.close()
        assert client.trouble() == "the engine was shut down"

    run(work())


def test_close_aborts_what_does_not_finish_in_time() -> None:
    async def work() -> None:
        client = await start(sizes=ENDLESS)
        news: asyncio.Queue[Output | Exception] = asyncio.Queue()
        client.submit(endless("a"), news.put_nowait)
        await news.get()
        await client.close(deadline_s=0.0)
        outputs = [news.get_nowait() for _ in range(news.qsize())]
        assert isinstance(outputs[-1], Output)
        assert outputs[-1].finish_reason == "abort"

    run(work())


def test_sigterm_finishes_cleanly_and_sigint_is_the_parents() -> None:
    async def work() -> None:
        client = await start()
        os.kill(client.info.pid, signal.SIGINT)
        assert await collect(client, request("a")) == {0: expect(request("a"))}
        running = asyncio.create_task(collect(client, request("b", max_tokens=50)))
        await client.ping()
        os.kill(client.info.pid, signal.SIGTERM)
        assert await running == {0: expect(request("b", max_tokens=50))}
        await client._watcher
        assert client._process._popen.returncode == 0
        await client.close()

    run(work())


def test_the_process_dies_with_its_parent() -> None:
    """A parent that is killed in the middle of a request; the pipe tells when the child is gone."""
    script = textwrap.dedent(
        f"""
        import asyncio, os, signal
        from fxlm.runtime.client import EngineClient
        from fxlm.runtime.request import Request
        from fxlm.runtime.sampling_params import SamplingParams
        async def work():
            kwargs = {{"sizes": {ENDLESS!r}}}
            client = await EngineClient.start({FACTORY!r}, kwargs, paths=[{ROOT!r}])
            params = SamplingParams(max_tokens=None)
            stream = client.stream(Request(request_id="a", prompt_token_ids=[1], params=params))
            await anext(stream)
            print(client.info.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        asyncio.run(work())
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.wait()
    parent.stdout.close()
    try:
        child = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    poller = zmq.Poller()
    poller.register(child, zmq.POLLIN)
    assert poller.poll(10_000), "the engine outlived its parent"
    os.close(child)


def test_without_a_unix_socket_the_port_is_encrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_IPC_PATH", 1)

    async def work() -> None:
        async with await start() as client:
            assert client._socket.last_endpoint.startswith(b"tcp://127.0.0.1:")
            assert client._socket.mechanism == zmq.CURVE
            assert await collect(client, request("a")) == {0: expect(request("a"))}

    run(work())


def test_the_wire_keeps_every_field() -> None:
    params = SamplingParams(
        n=2, temperature=0.5, seed=2**62, stop=["a"], logit_bias={3: -1.5}, max_tokens=None
    )
    item = Request(request_id="a", prompt_token_ids=[1], params=params, eos_token_ids=[2])
    assert decode_to_engine(encode(Submit(item))) == Submit(item)
