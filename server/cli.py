"""The command line: `fxlm serve | compile | plan | check | quantize | explain | verify | ...`.

Here: the parser, the dispatch, errors as sentences. Nothing heavy is imported before a command
runs, so that --help and --version answer at once. Not here: what the commands do.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import fxlm
from fxlm.compiler.errors import FxlmError, InvalidOption
from fxlm.compiler.nearest import did_you_mean
from fxlm.server.explorer_options import (
    add_bisect_options,
    add_diff,
    add_explain_options,
    add_verify_options,
)
from fxlm.server.options import (
    add_engine_options,
    add_model_argument,
    add_plan_options,
    add_quantize_options,
    add_server_options,
)

Command = Callable[[argparse.Namespace], int | None]


def serve_command(args: argparse.Namespace) -> int | None:
    """Compile if needed, start the engine, serve."""
    from fxlm.server.options import server_options
    from fxlm.server.serve import banner, serve

    keyed = bool(server_options(args).api_keys)
    return serve(args, lambda model, url: print(banner(model, url, keyed), flush=True))


def compile_command(args: argparse.Namespace) -> int | None:
    """Compile a model into an artifact."""
    from fxlm.runtime import launch

    return launch.compile_command(args)


def plan_command(args: argparse.Namespace) -> int | None:
    """Print what a model needs and what fits."""
    from fxlm.runtime import launch

    return launch.plan_command(args)


def check_command(args: argparse.Namespace) -> int | None:
    """Compare a model's greedy tokens with Hugging Face's."""
    from fxlm.runtime import launch

    return launch.check_command(args)


def explain_cache_command(args: argparse.Namespace) -> int | None:
    """Show the factors of a model's cache key."""
    from fxlm.runtime import launch

    return launch.explain_cache_command(args)


def explorer_command(args: argparse.Namespace) -> int | None:
    """Explain, verify, bisect and diff: what the compiler did, and whether it is right."""
    from fxlm.runtime.explain import commands

    run: Command = getattr(commands, f"{args.command}_command")
    return run(args)


def quantize_command(args: argparse.Namespace) -> int | None:
    """Write a quantized copy of a checkpoint."""
    from fxlm.runtime import launch

    return launch.quantize_command(args)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations: a flag is written out, or it is an error."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """One sentence; the whole usage would hide it."""
        self.exit(2, f"{self.prog}: {message}\nSee '{self.prog} --help'.\n")


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The top parser and the parser of each command."""
    top = Parser(prog="fxlm", description="An LLM engine in which the compiler is the product.")
    top.add_argument("--version", action="version", version=f"fxlm {fxlm.__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers: dict[str, Parser] = {}

    def add(
        name: str,
        run: Command,
        text: str,
        *,
        optional_model: bool = False,
        options: Callable[[Parser], None] = add_engine_options,
    ) -> Parser:
        model = "[MODEL]" if optional_model else "MODEL"
        usage = f"fxlm {name} {model} [options]"
        parser: Parser = commands.add_parser(name, help=text, description=text, usage=usage)
        parser.set_defaults(run=run)
        add_model_argument(parser, optional=optional_model)
        options(parser)
        parsers[name] = parser
        return parser

    serve_text = "serve a model over an OpenAI-compatible API"
    add_server_options(add("serve", serve_command, serve_text, optional_model=True))
    compiled = add("compile", compile_command, "compile a model into an artifact")
    compiled.add_argument("--output", metavar="DIR", help="where to put the artifact")
    add_plan_options(
        add("plan", plan_command, "print the memory a model needs, without loading it")
    )
    add("check", check_command, "compare a model's tokens with those of Hugging Face")
    rounding = "write a quantized copy of a checkpoint, with the error of each layer"
    add("quantize", quantize_command, rounding, options=add_quantize_options)
    add_explain_options(add("explain", explorer_command, "show what each pass did, and its cost"))
    text = "show what an artifact is found by, and what differs from the nearest one"
    add("explain-cache", explain_cache_command, text)
    verified = "hold a compiled model against float32, and stamp its artifact"
    add_verify_options(add("verify", explorer_command, verified))
    add_bisect_options(add("bisect", explorer_command, "find the pass that makes a model wrong"))
    parsers["diff"] = add_diff(commands, explorer_command)
    return top, parsers


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse `argv`; an unknown flag ends the process with the nearest known one."""
    top, parsers = build_parser()
    if argv and not argv[0].startswith("-") and argv[0] not in parsers:
        names = ", ".join(parsers)
        guess = did_you_mean(argv[0], parsers)
        top.error(f"there is no command {argv[0]!r}; there are {names}.{guess}")
    args, unknown = top.parse_known_args(argv)
    if unknown:
        parser = parsers[args.command]
        known = [flag for flag in parser._option_string_actions if flag.startswith("--")]
        first = unknown[0].partition("=")[0]
        guess = did_you_mean(first, known) if first.startswith("-") else ""
        parser.error(f"unrecognized argument: {first}.{guess}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 (it failed), 2 (wrong use) or 130 (Ctrl-C)."""
    args = parse(sys.argv[1:] if argv is None else argv)
    run: Command = args.run
    try:
        return run(args) or 0
    except InvalidOption as error:
        print(f"fxlm {args.command}: {error}", file=sys.stderr)
        return 2
    except FxlmError as error:
        print(f"fxlm {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
