"""The commands `fxlm explain`, `verify`, `bisect` and `diff`: what they print, and their status."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from fxlm.compiler.artifact import Artifact
from fxlm.compiler.cost import Shape
from fxlm.compiler.errors import ArtifactError, InvalidOption
from fxlm.runtime.explain import text
from fxlm.runtime.launch import engine_options
from fxlm.runtime.options import EngineOptions

DIFFERENT = 1  # exit status of `fxlm diff`: numbers moved by more than the tolerance
RESHAPED = 3  # they did not, or were not compared, but graphs, weights or rewrites differ


def explain_command(args: argparse.Namespace) -> int:
    """``fxlm explain``: a line a pass, or all of one pass; the page and the JSON where asked."""
    from fxlm.compiler.cache import cache_directory
    from fxlm.models.checkpoint import open_checkpoint
    from fxlm.runtime.explain import kept
    from fxlm.runtime.explain.page import render
    from fxlm.runtime.explain.report import SHAPES, Choices, explain
    from fxlm.runtime.options import compile_options

    _require_file("--html", args.html)
    _require_file("--json", args.json)
    wanted = [item for item in args.passes if ":" not in item]
    args.passes = [item for item in args.passes if ":" in item]
    options = _options(args)
    checkpoint = open_checkpoint(options.model, options.revision, options.trust_remote_code)
    choices = Choices(
        layers=args.layers, times="compiled" if args.time else "interpreted",
        shapes=tuple(map(_shape, args.shapes)) if args.shapes else SHAPES,
    )  # fmt: skip
    root = cache_directory(options.cache_dir)
    report = explain(
        checkpoint, compile_options(options), choices, cache_dir=root, wanted=wanted, tell=_say,
    )  # fmt: skip
    if not (wanted or args.layers or args.shapes):  # what a server's page shows, too
        kept.keep(report, kept.place_of(checkpoint, compile_options(options), root))
    for line in text.lines(report, wanted):
        print(line)
    for path, content in ((args.json, json.dumps), (args.html, render)):
        if path is not None:
            path.write_text(content(report), encoding="utf-8")
            print(path)
    return 0


def verify_command(args: argparse.Namespace) -> int:
    """``fxlm verify``: errors by mode, then the stamp; 1 if they are above the tolerance."""
    from fxlm.runtime.explain.verify import EXACT, verify

    stamp, made = verify(_options(args), tolerance=args.tolerance, report=_report)
    for mode, found in stamp.errors.items():
        print(f"{mode:<16} {found['absolute']:9.2e} nats  {found['typical']:9.2e} typically  "
              f"top-1 {found['agreement']:6.1%} of {found['num_rows']} rows")  # fmt: skip
    print(f"the captured graph in {stamp.dtype} itself: {stamp.rounding:.2e} nats; allowed "
          f"{stamp.tolerance:.2e}, typically {stamp.typical_tolerance:.2e}")  # fmt: skip
    if stamp.column is not None:
        print(f"the passes in float32: {stamp.column:.2e} nats; allowed {EXACT:g}")
    print(stamp.line())
    print(made.artifact.path)
    return 0 if stamp.passed else 1


def bisect_command(args: argparse.Namespace) -> int:
    """``fxlm bisect``: each prefix that was run, then the guilty pass; 1 if there is one."""
    from fxlm.models.checkpoint import open_checkpoint
    from fxlm.runtime.explain import bisect
    from fxlm.runtime.explain.repro import where, write_repro
    from fxlm.runtime.options import compile_options

    _require_file("--output", args.output)

    def tell(line: bisect.Line) -> None:
        mark = "deviates" if line.deviates else ""
        print(f"up to {line.name:<22} {line.errors.text()} {mark}".rstrip(), flush=True)

    options = _options(args)
    checkpoint = open_checkpoint(options.model, options.revision, options.trust_remote_code)
    choices = compile_options(options)
    guilt = bisect.bisect(checkpoint, choices, tolerance=args.tolerance, tell=tell)
    if guilt is None:
        print("no pass changes what the model says")
        return 0
    print(f"pass {guilt.name}, {where(guilt)}; shown in {guilt.dtype}, {guilt.mode}")
    for path in write_repro(guilt, args.output):
        print(path)
    return 1


def diff_command(args: argparse.Namespace) -> int:
    """``fxlm diff``: structure, then numbers; see `DIFFERENT` and `RESHAPED` for the status."""
    from fxlm.models.checkpoint import open_checkpoint
    from fxlm.runtime.explain.diff import numbers, structure

    first, second = _artifact("ARTIFACT_A", args.first), _artifact("ARTIFACT_B", args.second)
    changes = structure(first, second)
    for change in changes:
        print(change.line())
    made = sum(not change.given for change in changes)
    print(f"{len(changes) - made} differences of what went in, {made} of what came out")
    status = RESHAPED if made and args.structure == "fail" else 0
    if args.model is None:
        print("numbers were not compared: name the checkpoint with --model")
        return status
    found = numbers(first, second, open_checkpoint(args.model))
    for mode, errors in found.items():
        print(f"{mode:<16} {errors.text()}")
    worst = max(errors.absolute for errors in found.values())
    verdict = "within" if worst <= args.tolerance else "ABOVE"
    print(f"largest error {worst:.2e} nats, {verdict} the tolerance of {args.tolerance:g}")
    return status if worst <= args.tolerance else DIFFERENT


def _artifact(name: str, path: Path) -> Artifact:
    """Open one; status 2 if it cannot be, which is no verdict on what differs."""
    from fxlm.compiler.artifact import open_artifact

    try:
        return open_artifact(path)
    except ArtifactError as error:
        raise InvalidOption(name, str(path), str(error)) from error


def _shape(values: tuple[int, int, int]) -> Shape:
    """A step as ``--shape`` names it: sequences, new tokens of each, context."""
    seqs, new, context = values
    what = "decode" if new == 1 else "prefill"
    name = f"{what}, {seqs} x {new} of {context}"
    return Shape(name=name, num_seqs=seqs, num_new=new, context=context)


def _require_file(option: str, path: Path | None) -> None:
    """Tell before the work starts that its result cannot be written.

    Raises:
        InvalidOption: the path is a directory, or none can be written where it is.
    """
    if path is None:
        return
    if path.is_dir():
        raise InvalidOption(option, str(path), "it is a directory; name a file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        reason = f"{(error.strerror or str(error)).lower()}; name a file that can be written"
        raise InvalidOption(option, str(path), reason) from error


def _options(args: argparse.Namespace) -> EngineOptions:
    from fxlm.runtime.worker import set_threads

    options = engine_options(args)
    set_threads(options.threads)
    return options


def _report(stage: str, seconds: float) -> None:
    _say(f"{stage:<22}{seconds:6.1f} s")


def _say(line: str) -> None:
    print(f"fxlm: {line}", file=sys.stderr, flush=True)
