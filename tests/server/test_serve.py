"""`fxlm serve` as a process, its engine in another one, over the runtime's fake model."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from tests.server.conftest import PLAIN
from tests.server.test_model import checkpoint

PROGRAM = """
import json, sys
from pathlib import Path
from fxlm.runtime import launch
from fxlm.server.cli import main

kwargs, path = json.loads(sys.argv[1]), Path(sys.argv[2])
launch.prepare = lambda args: launch.EngineSpec(
    factory="tests.runtime.fake:make_engine", kwargs=kwargs, name="fake", directory=path,
    tokenizer=path)
sys.exit(main(["serve", "fake", "--port", "0", *sys.argv[3:]]))
"""


class Process:
    """The command, until it has said where it listens."""

    def __init__(self, repo: Path, path: Path, kwargs: str, *flags: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM, kwargs, str(path), *flags],
            env={**os.environ, "PYTHONPATH": str(repo)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        assert first.startswith("Serving fake on http://127.0.0.1:"), first
        self.url = first.split()[-1]
        self.http = httpx2.Client(base_url=self.url, verify=PLAIN, timeout=60)
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key="x",
            max_retries=0,
            http_client=openai.DefaultHttpxClient(verify=PLAIN, timeout=60),
        )

    def children(self) -> list[int]:
        pid = self.process.pid
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def stop(self) -> int:
        self.client.close()
        self.http.close()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@pytest.fixture
def serve(repo: Path, tmp_path: Path) -> Iterator[list[Process]]:
    """Put processes here; they are stopped at the end, if the test has not done it."""
    made: list[Process] = []
    checkpoint(tmp_path)
    yield made
    for item in made:
        item.stop()


def test_whole_way(serve: list[Process], repo: Path, tmp_path: Path) -> None:
    """Ask, stream, leave early, stop: the engine's blocks and its process are gone."""
    sizes = '{"sizes": {"max_model_len": 4000, "num_blocks": 1100}}'
    template = "--chat-template={{ messages[0].content }}"
    server = Process(repo, tmp_path, sizes, template)
    serve.append(server)
    ask = [{"role": "user", "content": "abc"}]
    assert server.http.get("/health").status_code == 200
    whole = server.client.chat.completions.create(
        model="fake", messages=ask, max_tokens=20, temperature=0, logprobs=True, top_logprobs=2
    )
    assert whole.usage.prompt_tokens == 3
    assert whole.usage.completion_tokens == 20
    assert len(whole.choices[0].logprobs.content) == 20
    stream = server.client.chat.completions.create(
        model="fake", messages=ask, max_tokens=20, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == whole.choices[0].message.content
    scored = server.client.completions.create(
        model="fake", prompt=[1, 2, 3], max_tokens=2, echo=True, logprobs=1, n=2, seed=1
    )
    assert len(scored.choices[1].logprobs.tokens) == 5

    with server.client.chat.completions.create(
        model="fake", messages=ask, max_tokens=3900, stream=True
    ) as leaving:
        next(iter(leaving))
    gone = 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="fake"} 1.0'
    while gone not in server.http.get("/metrics").text:
        pass
    (engine,) = server.children()
    assert server.stop() == 0
    assert not Path(f"/proc/{engine}").exists()


def test_engine_that_dies(
    serve: list[Process], repo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The request is told why, and then the server ends, so that a supervisor starts it anew."""
    server = Process(repo, tmp_path, '{"die_at": 3}')
    serve.append(server)
    with pytest.raises(openai.APIStatusError) as caught:
        server.client.completions.create(model="fake", prompt="abc", max_tokens=20)
    assert caught.value.status_code == 503
    assert caught.value.code == "engine_dead"
    assert "exit code 9" in caught.value.message
    assert server.process.wait(60) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == "fxlm serve: the engine process ended with exit code 9"


def test_engine_that_does_not_start(repo: Path, tmp_path: Path) -> None:
    checkpoint(tmp_path)
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, '{"nothing": 1}', str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(repo)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "fxlm serve: " in done.stderr.splitlines()[-1]
    assert "unexpected keyword argument 'nothing'" in done.stderr
