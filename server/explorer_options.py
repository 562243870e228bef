"""Flags of `fxlm explain`, `bisect` and `diff`. Not here: what they do (`fxlm.runtime.explain`)."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxlm.server.options import whole


def add_explain_options(parser: argparse.ArgumentParser) -> None:
    """What to show, and where to. ``--pass NAME`` shows one pass; with a colon it adds one."""
    group = parser.add_argument_group("report")
    group.add_argument("--html", type=Path, metavar="FILE", help="write the page, self-contained")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    group.add_argument(
        "--layers", type=whole(1), metavar="N",
        help="look at the first N layers only (default: all, or 2 where memory is short)",
    )  # fmt: skip
    group.add_argument(
        "--shape", type=shape, action="append", metavar="SEQSxNEW@CONTEXT", dest="shapes",
        help="cost and time a step of SEQS sequences with NEW tokens each, which then are CONTEXT"
        " tokens long; may be repeated (default: 1x1@128, 8x1@128 and 1x128@128)",
    )  # fmt: skip
    group.add_argument(
        "--time", action="store_true",
        help="compile the step with and without each pass, and time it (minutes)",
    )  # fmt: skip


def shape(text: str) -> tuple[int, int, int]:
    """Sequences, new tokens of each, and context of a step: ``SEQSxNEW@CONTEXT``."""
    match = re.fullmatch(r"(\d+)x(\d+)@(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write SEQSxNEW@CONTEXT: 32x1@1024")
    seqs, new, context = map(int, match.groups())
    if not seqs >= 1 or not 1 <= new <= context:
        reason = "a step has sequences, and new tokens that are part of the context"
        raise argparse.ArgumentTypeError(f"{text!r}: {reason}")
    return seqs, new, context


def nats(text: str) -> float:
    """A tolerance; NaN would let nothing pass and a negative one neither."""
    value = float(text)
    if not value >= 0.0:
        raise argparse.ArgumentTypeError(f"{text} is no tolerance; give a number from 0 up")
    return value


def add_verify_options(parser: argparse.ArgumentParser) -> Any:
    """What counts as wrong."""
    group = parser.add_argument_group("search")
    group.add_argument(
        "--tolerance", type=nats, metavar="NATS",
        help="error of a log-probability that is a fault (default: a multiple of rounding)",
    )  # fmt: skip
    return group


def add_bisect_options(parser: argparse.ArgumentParser) -> None:
    """What counts as wrong, and where the script goes."""
    group = add_verify_options(parser)
    group.add_argument(
        "--output", type=Path, default=Path("repro.py"), metavar="FILE",
        help="script that shows the fault (default: repro.py)",
    )  # fmt: skip


def add_diff(commands: Any, run: Callable[[argparse.Namespace], int | None]) -> Any:
    """The parser of `fxlm diff`, which takes artifacts instead of a model."""
    text = "compare two artifacts: graphs, passes, versions and numbers"
    parser = commands.add_parser(
        "diff", help=text, description=text, usage="fxlm diff ARTIFACT_A ARTIFACT_B [options]"
    )
    parser.set_defaults(run=run)
    parser.add_argument("first", type=Path, metavar="ARTIFACT_A")
    parser.add_argument("second", type=Path, metavar="ARTIFACT_B")
    parser.add_argument(
        "--model", metavar="MODEL", help="checkpoint of both: compare their numbers, too"
    )
    parser.add_argument(
        "--tolerance", type=nats, default=0.05, metavar="NATS",
        help="error of a log-probability above which the exit status is 1 (default: 0.05)",
    )  # fmt: skip
    parser.add_argument(
        "--structure", choices=("fail", "ignore"), default="fail",
        help="exit status where numbers are within the tolerance, but graphs, weights or counts of"
        " rewrites differ: 3, or 0 (default: fail)",
    )  # fmt: skip
    return parser
