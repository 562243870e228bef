"""A model under two sets of options, step by step in turn: what a pass or a format is worth.

    python bench/turns.py MODEL --first disable_passes=split_rope
    python bench/turns.py MODEL --second quantization=int8

Two engines in one process take turns, so that both meet the same weather: on a host that others
use, what saves two percent shows in pairs of steps and not in two runs. Options are those of
``EngineOptions``; those that are not named are the same for both.

Writes ``bench/results/turns.json``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from common import print_table, write_results
from engines import begin_decoding, finish, submit
from fxlm.runtime.engine import Engine
from fxlm.runtime.options import from_mapping
from fxlm.runtime.worker import build_engine

Pair = tuple[Engine, Engine]  # the first, the second


def main() -> None:
    """Measure, print, write."""
    options = _parse()
    pair = (_engine(options, options.first), _engine(options, options.second))
    rows = [_decode(pair, batch, options.prompt_decode, options.steps) for batch in options.batch]
    rows.append(_prefill(pair, options.prompt, options.repeats))
    pairs = [" ".join(given) or "as it is" for given in (options.first, options.second)]
    print_table(rows, title=f"{options.model}: {pairs[0]}, then {pairs[1]}")
    chosen = {k: str(v) for k, v in vars(options).items() if k != "output"}
    chosen["model"] = Path(options.model).name
    print(write_results(options.name, {"rows": rows}, options=chosen, output=options.output))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="bundled")
    for which in ("first", "second"):
        parser.add_argument(f"--{which}", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--both", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--prompt-decode", type=int, default=128, help="tokens before decoding")
    parser.add_argument("--steps", type=int, default=60, help="of decoding, each engine")
    parser.add_argument("--repeats", type=int, default=8, help="prefills, each engine")
    parser.add_argument("--name", default="turns", help="of the result file")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def _engine(options: argparse.Namespace, given: list[str]) -> Engine:
    chosen: dict[str, object] = {}
    for name, _, value in (word.partition("=") for word in [*options.both, *given]):
        chosen[name] = value.split("+") if name == "disable_passes" else value
    most = max(options.batch, default=1)
    engine, _, _ = build_engine(
        from_mapping(
            {
                "model": options.model,
                "enable_prefix_caching": False,
                "max_num_seqs": most,
                "max_num_batched_tokens": max(512, most),
                "max_model_len": max(options.prompt, options.prompt_decode + options.steps) + 16,
                **chosen,
            }
        )
    )
    return engine


def _decode(pair: Pair, batch: int, prompt: int, steps: int) -> dict[str, object]:
    for engine in pair:
        begin_decoding(engine, batch, prompt, steps + 8)
    row = _in_turn(pair, steps, lambda engine: engine.step())
    for engine in pair:
        finish(engine)
    return {"what": "decode", "batch": batch, "tokens": batch, **row}


def _prefill(pair: Pair, length: int, repeats: int) -> dict[str, object]:
    def run(engine: Engine) -> None:
        submit(engine, 1, length, 1)
        finish(engine)

    _in_turn(pair, 1, run)  # warms up
    return {"what": "prefill", "batch": 1, "tokens": length, **_in_turn(pair, repeats, run)}


def _in_turn(pair: Pair, count: int, run: Callable[[Engine], object]) -> dict[str, float]:
    """Medians of ``count`` runs of each, and of their ratio; who goes first alternates."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(count):
        for index in ((0, 1), (1, 0))[turn % 2]:
            started = time.perf_counter()
            run(pair[index])
            seconds[index].append(time.perf_counter() - started)
    ratios = sorted(first / second for first, second in zip(*seconds, strict=True))
    medians = [statistics.median(each) * 1e3 for each in seconds]
    return {
        "first_ms": medians[0],
        "second_ms": medians[1],
        "of_medians": medians[0] / medians[1],
        "speedup": statistics.median(ratios),
        "quartile_1": ratios[len(ratios) // 4],
        "quartile_3": ratios[3 * len(ratios) // 4],
    }


if __name__ == "__main__":
    main()
