"""GET /compiler: made once, beside the server, when somebody asks."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from fxlm.server.explorer import Explorer
from tests.server.conftest import Running, Starter

WRITES = (
    "import json, pathlib, sys; job = json.loads(sys.stdin.readline()); "
    "pathlib.Path(job['output']).write_text('<h1>' + job['options']['model'] + '</h1>')"
)
SLOW = "import sys, time; sys.stdin.readline(); print('pass <one>', flush=True); time.sleep(60)"
COUNTS = (
    "import json, pathlib, sys, time; job = json.loads(sys.stdin.readline())\n"
    "while time.process_time() < 0.5: pass\n"
    "pathlib.Path(job['output']).write_text('done')"
)
FAILS = "import sys; sys.stdin.readline(); sys.exit('it does not capture.')"


@pytest.fixture
def explored(start: Starter) -> Iterator[Running]:
    running = start()
    yield running
    running.call(lambda: None)


def use(running: Running, code: str) -> Explorer:
    explorer = Explorer({"model": "mine"}, (sys.executable, "-c", code))
    running.app.state.explorer = explorer
    return explorer


def test_it_is_made_and_kept(explored: Running) -> None:
    explorer = use(explored, WRITES)
    first = explored.http.get("/compiler")
    assert first.status_code == 202
    assert first.headers["Retry-After"]
    explored.wait(lambda: explorer.building is None)
    page = explored.http.get("/compiler")
    assert (page.status_code, page.text) == (200, "<h1>mine</h1>")
    assert page.headers["Content-Type"].startswith("text/html")


def test_progress_is_shown_while_it_is_made(explored: Running) -> None:
    explorer = use(explored, SLOW)
    explored.http.get("/compiler")
    explored.wait(lambda: explorer.said == "pass <one>")
    assert "pass &lt;one&gt; (" in explored.http.get("/compiler").text
    explored.call(lambda: explorer.building.cancel())
    explored.wait(lambda: explorer.building is None)


def test_it_stands_still_while_requests_run(explored: Running) -> None:
    explorer = use(explored, COUNTS)
    explorer.busy = lambda: True
    explored.http.get("/compiler")
    explored.wait(lambda: explorer.paused)
    assert "standing still, as requests run" in explored.http.get("/compiler").text
    explorer.busy = lambda: False
    explored.wait(lambda: explorer.page == b"done")


def test_what_fails_is_told_and_tried_again(explored: Running) -> None:
    explorer = use(explored, FAILS)
    assert explored.http.get("/compiler").status_code == 202
    explored.wait(lambda: explorer.building is None)
    told = explored.http.get("/compiler")
    assert told.status_code == 500
    assert "it does not capture" in told.json()["error"]["message"]
    assert explored.http.get("/compiler").status_code == 202
    explored.wait(lambda: explorer.building is None)


def test_a_server_without_a_compiler_says_so(explored: Running) -> None:
    assert explored.http.get("/compiler").status_code == 404


def test_it_is_guarded(start: Starter) -> None:
    assert start(api_keys=("secret",)).http.get("/compiler").status_code == 401
