"""Keys on every route, whatever routes there are; origins; the defaults of the address."""

import httpx2
import openai
import pytest
from starlette.routing import Route

from fxlm.server.app import routes
from fxlm.server.options import ServerOptions
from tests.server.conftest import Running, Starter
from tests.server.test_errors import TEXT, check, post

OPEN = {"/health", "/version"}


@pytest.fixture(scope="module")
def guarded() -> Running:
    server = Running(ServerOptions(port=0, api_keys=("secret", "other")))
    yield server
    server.stop()


def every_route() -> list[tuple[str, str]]:
    found = []
    for route in routes():
        assert isinstance(route, Route), route
        path = route.path.replace("{model:path}", "fake")
        found += [(method, path) for method in sorted(route.methods or ())]
    return found


@pytest.mark.parametrize(("method", "path"), [*every_route(), ("GET", "/nothing"), ("PUT", "/")])
@pytest.mark.parametrize(
    "header",
    [None, "secret", "Basic secret", "Bearer", "Bearer secret x", "Bearer secre", "Bearer \xff"],
)
def test_every_route_asks(guarded: Running, method: str, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    reply = guarded.http.request(method, path, headers=headers)
    if path in OPEN:
        assert reply.status_code == 200
        return
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    if method != "HEAD":
        check(reply, 401, None)


def test_paths_that_look_open_are_not(guarded: Running) -> None:
    for path in ("/health/", "//health", "/HEALTH", "/health%2f", "/health;x", "/v1/models/health"):
        url = httpx2.URL(guarded.url).copy_with(raw_path=path.encode())
        assert guarded.http.get(url).status_code in (401, 404), path
    assert guarded.http.get("/v1/models?path=/health").status_code == 401


def test_both_keys(guarded: Running) -> None:
    """Each opens; and each has a prefix cache of its own."""
    salts = []
    for key in ("secret", "other"):
        client = guarded.client(api_key=key)
        client.completions.create(
            model="fake", prompt="x", max_tokens=1, extra_body={"cache_salt": "s"}
        )
        salts.append(guarded.engine.requests[-1].cache_salt)
        client.completions.create(model="fake", prompt="x", max_tokens=1)
        salts.append(guarded.engine.requests[-1].cache_salt)
    assert len(set(salts)) == 4
    with pytest.raises(openai.AuthenticationError):
        guarded.client(api_key="third").models.list()


def test_two_authorization_headers(guarded: Running) -> None:
    headers = [("Authorization", "Bearer secret"), ("Authorization", "Bearer secret")]
    assert guarded.http.get("/v1/models", headers=headers).status_code == 401


def test_metrics_public(start: Starter) -> None:
    server = start(api_keys=("k",), metrics_public=True)
    assert server.http.get("/metrics").status_code == 200
    assert server.http.get("/v1/models").status_code == 401


def test_root_path(start: Starter) -> None:
    """The proxy's prefix counts neither for routing nor for what is open."""
    server = start(api_keys=("k",), root_path="/llm")
    url = server.url.removesuffix("/llm")
    assert httpx2.get(f"{url}/health").status_code == 200
    assert httpx2.get(f"{url}/v1/models").status_code == 401
    key = {"Authorization": "Bearer k"}
    assert httpx2.get(f"{url}/v1/models", headers=key).status_code == 200


def test_no_origin_is_allowed(running: Running) -> None:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    reply = running.http.options("/v1/completions", headers=headers)
    assert reply.status_code == 405
    assert "access-control-allow-origin" not in reply.headers
    reply = post(running, "/v1/completions", TEXT, Origin="https://evil.example")
    assert "access-control-allow-origin" not in reply.headers


def test_allowed_origin(start: Starter) -> None:
    """A preflight carries no key and needs none; the call itself does."""
    server = start(api_keys=("k",), allowed_origins=("https://app.example",))
    headers = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    reply = server.http.options("/v1/completions", headers=headers)
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == "https://app.example"
    reply = post(server, "/v1/completions", TEXT, Origin="https://app.example")
    assert reply.status_code == 401
    assert reply.headers["access-control-allow-origin"] == "https://app.example"


def test_defaults_are_this_machine_alone() -> None:
    assert ServerOptions().host == "127.0.0.1"
    assert not ServerOptions().is_public
    assert not ServerOptions(host="::1").is_public
    assert ServerOptions(host="0.0.0.0").is_public
    assert ServerOptions(host="example.org").is_public
