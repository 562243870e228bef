"""The command line: what it accepts, what it says, and how little it imports."""

import argparse
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fxlm
from fxlm.compiler.errors import InvalidModel, InvalidOption
from fxlm.server import cli
from fxlm.server.options import KEY_VARIABLE, ServerOptions, server_options, size_bytes
from fxlm.server.serve import banner, base_url, bind, taken

HEAVY = ("torch", "transformers", "numpy", "starlette", "uvicorn", "zmq", "jinja2", "tokenizers")


def modules_after(code: str, *, expect: int = 0) -> tuple[set[str], str]:
    """Top-level modules that a fresh interpreter has after `code`, and what it printed."""
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit as e:\n    print(e.code)\n"
    script += "print('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return {name.partition(".")[0] for name in done.stderr.split()}, done.stdout


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["serve", "--help"]])
def test_help_is_light(argv: list[str]) -> None:
    modules, said = modules_after(f"from fxlm.server.cli import main; main({argv})")
    assert not modules & set(HEAVY)
    assert "fxlm" in said


def test_the_server_needs_no_torch() -> None:
    """Everything that the process of the API imports."""
    imports = "import fxlm.server.app, fxlm.server.serve, fxlm.server.engine, fxlm.runtime.launch"
    modules, _ = modules_after(imports)
    assert "starlette" in modules
    assert not modules & {"torch", "transformers"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"fxlm {fxlm.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["serve", "--max-model-length", "4"], "--max-model-length. Did you mean --max-model-len?"),
        (["serve", "--max_model_len", "4"], "Did you mean --max-model-len?"),
        (["serve", "--max-model", "4"], "unrecognized argument: --max-model"),
        (["serve", "--prot=4"], "Did you mean --port?"),
        (["serve", "a", "b"], "unrecognized argument: b"),
        (["compile", "m", "--port", "1"], "unrecognized argument: --port"),
        (["serv"], "no command 'serv'; there are serve, compile, plan, check, quantize, explain, "),
        (["serv"], "Did you mean serve?"),
        ([], "required: COMMAND"),
        (["plan"], "required: MODEL"),
        (["serve", "--dtype", "float13"], "--dtype: invalid choice"),
        (["serve", "--port", "x"], "--port: invalid integer value"),
        (["serve", "--max-num-seqs", "0"], "0 is less than 1"),
        (["explain", "m", "--layers", "0"], "0 is less than 1"),
        (["explain", "m", "--shape", "8"], "'8' is no shape; write SEQSxNEW@CONTEXT"),
        (["explain", "m", "--shape", "8x9@8"], "new tokens that are part of the context"),
        (["serve", "--memory-fraction", "1.5"], "not between 0 and 1"),
        (["serve", "--kv-cache-memory-bytes", "lots"], "'lots' is no size"),
    ],
)
def test_wrong_use(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option"), [("explain", "--html"), ("explain", "--json"), ("bisect", "--output")]
)
@pytest.mark.parametrize(
    ("place", "said"), [("", "is a directory"), ("nowhere/x", "no such file"), ("file/x", "not a")]
)
def test_where_results_go_is_checked_before_the_work(
    command: str, option: str, place: str, said: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("fxlm.models.checkpoint.open_checkpoint", None)  # the work would fail
    assert cli.main([command, "bundled", option, str(tmp_path / place)]) != 0
    error = capsys.readouterr().err
    assert option in error
    assert said in error


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("2GiB", 2 << 30), ("2G", 2 << 30), ("2g", 2 << 30), ("2GB", 2 * 10**9),
     ("512 MiB", 512 << 20), ("1.5k", 1536), ("3kb", 3000), ("1T", 1 << 40), ("100b", 100)],
)  # fmt: skip
def test_size(text: str, value: int) -> None:
    assert size_bytes(text) == value


@pytest.mark.parametrize("text", ["", "0", "-1", "GiB", "1e9", "2XB", "0.1b"])
def test_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        size_bytes(text)


def test_engine_flags() -> None:
    args = cli.parse(
        ["serve", "--no-enable-prefix-caching", "--pass", "a.py:f", "--pass", "b.py:g",
         "--disable-pass", "fuse_qkv", "--kv-cache-memory-bytes", "1GiB"]
    )  # fmt: skip
    assert args.model == "bundled"
    assert args.enable_prefix_caching is False
    assert args.passes == ["a.py:f", "b.py:g"]
    assert args.disable_passes == ["fuse_qkv"]
    assert args.kv_cache_memory_bytes == 1 << 30


def test_every_engine_option_has_a_flag() -> None:
    """Flags and `EngineOptions` name the same things."""
    from dataclasses import fields

    from fxlm.runtime.options import EngineOptions

    args = vars(cli.parse(["serve", "m"]))
    assert {field.name for field in fields(EngineOptions)} <= set(args)


def test_server_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "from-env")
    options = server_options(
        cli.parse(["serve", "--api-key", "a", "--api-key", "b", "--max-body-size", "1MiB"])
    )
    assert options.api_keys == ("a", "b", "from-env")
    assert options.limits.body_bytes == 1 << 20
    monkeypatch.delenv(KEY_VARIABLE)
    assert server_options(cli.parse(["serve"])).api_keys == ()
    assert server_options(cli.parse(["serve"])) == ServerOptions()


@pytest.mark.parametrize(
    "flags",
    [["--api-key", " "], ["--ssl-keyfile", "k"], ["--port", "70000"], ["--root-path", "x"]],
)
def test_combinations(flags: list[str]) -> None:
    with pytest.raises(InvalidOption):
        server_options(cli.parse(["serve", *flags]))


def test_commands_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command calls the function of its name in `fxlm.runtime.launch`."""
    called: list[tuple[str, str]] = []
    launch: Any = ModuleType("fxlm.runtime.launch")
    for name in ("compile", "plan", "check"):
        run = lambda args, name=name: called.append((name, args.model)) or 3  # noqa: E731
        setattr(launch, f"{name}_command", run)
    monkeypatch.setitem(sys.modules, "fxlm.runtime.launch", launch)
    monkeypatch.setattr("fxlm.runtime.launch", launch, raising=False)
    for name in ("compile", "plan", "check"):
        assert cli.main([name, "m"]) == 3
    assert called == [("compile", "m"), ("plan", "m"), ("check", "m")]


def test_errors_are_sentences(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise args.error

    for error, status in (
        (InvalidModel("no such model"), 1),
        (InvalidOption("--x", 1, "write 2"), 2),
        (KeyboardInterrupt(), 130),
    ):
        args = argparse.Namespace(run=fail, error=error, command="serve")
        monkeypatch.setattr(cli, "parse", lambda _, args=args: args)
        assert cli.main(["serve"]) == status
    said = capsys.readouterr().err
    assert said == "fxlm serve: no such model\nfxlm serve: --x=1 cannot be used: write 2\n"


def test_taken_port() -> None:
    with bind(ServerOptions(port=0)) as held:
        held.listen()
        port = held.getsockname()[1]
        with pytest.raises(InvalidOption, match="address already in use; choose another"):
            bind(ServerOptions(port=port))


def test_unix_socket(tmp_path: Any) -> None:
    """One left behind by a dead server is taken over; one that answers is not, nor is a file."""
    path = str(tmp_path / "s")
    bind(ServerOptions(uds=path)).close()
    with bind(ServerOptions(uds=path)) as held:
        held.listen()
        with pytest.raises(InvalidOption):
            bind(ServerOptions(uds=path))
    with taken(ServerOptions(uds=str(tmp_path / "gone"))):
        assert (tmp_path / "gone").is_socket()
    assert not (tmp_path / "gone").exists()
    (tmp_path / "file").write_text("keep me")
    with pytest.raises(InvalidOption):
        bind(ServerOptions(uds=str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "keep me"


def test_banner() -> None:
    url = base_url(ServerOptions(host="0.0.0.0", root_path="/llm"), 81)
    assert url == "http://127.0.0.1:81/llm"
    assert base_url(ServerOptions(host="::1", ssl_certfile="c"), 82) == "https://[::1]:82"
    said = banner("m", url)
    assert "Serving m on http://127.0.0.1:81/llm" in said
    assert "curl http://127.0.0.1:81/llm/v1/chat/completions -H" in said
    assert banner("m", None) == "Serving m."
    assert "Authorization" not in said
    assert "-H 'Authorization: Bearer KEY'" in banner("m", url, keyed=True)


def test_explorer_commands_have_their_options() -> None:
    args = cli.parse(["explain", "m", "--pass", "fuse_qkv", "--html", "r.html", "--layers", "2"])
    assert (args.passes, args.html.name, args.layers) == (["fuse_qkv"], "r.html", 2)
    args = cli.parse(["explain", "m", "--shape", "32x1@1024", "--shape", "1x512@512"])
    assert args.shapes == [(32, 1, 1024), (1, 512, 512)]
    args = cli.parse(["bisect", "m", "--tolerance", "0.1", "--output", "r.py"])
    assert (args.tolerance, args.output.name) == (0.1, "r.py")
    args = cli.parse(["diff", "a", "b", "--model", "m"])
    assert (args.first.name, args.second.name, args.tolerance) == ("a", "b", 0.05)


@pytest.mark.parametrize("name", ["explain", "verify", "bisect", "diff"])
def test_explorer_commands_dispatch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxlm.runtime.explain import commands

    monkeypatch.setattr(commands, f"{name}_command", lambda args: 3)
    assert cli.main([name, "m", *(["n"] if name == "diff" else [])]) == 3
