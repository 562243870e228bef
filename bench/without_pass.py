"""What one pass is worth: a model with and without it. ``python bench/without_pass.py PASS MODEL``

Two engines in one process take turns, step by step, so that both meet the same weather: on a host
that others use, a pass that saves two percent shows in pairs of steps and not in two runs.

Writes ``bench/results/without_pass.json``.
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
from fxlm.runtime.options import EngineOptions
from fxlm.runtime.worker import build_engine

Pair = tuple[Engine, Engine]  # without the pass, with it


def main() -> None:
    """Measure, print, write."""
    options = _parse()
    pair = (_engine(options, [options.without]), _engine(options, []))
    rows = [_decode(pair, batch, options.prompt_decode, options.steps) for batch in options.batch]
    rows.append(_prefill(pair, options.prompt, options.repeats))
    print_table(rows, title=f"{options.model} without and with {options.without}")
    chosen = {k: str(v) for k, v in vars(options).items() if k != "output"}
    chosen["model"] = Path(options.model).name
    print(write_results(options.name, {"rows": rows}, options=chosen, output=options.output))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("without", metavar="PASS", help="e.g. fuse_activation")
    parser.add_argument("model", nargs="?", default="bundled")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", help="round the weights while loading: int8, int4, ...")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--prompt-decode", type=int, default=128, help="tokens before decoding")
    parser.add_argument("--steps", type=int, default=60, help="of decoding, each engine")
    parser.add_argument("--repeats", type=int, default=8, help="prefills, each engine")
    parser.add_argument("--name", default="without_pass", help="of the result file")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def _engine(options: argparse.Namespace, without: list[str]) -> Engine:
    engine, _, _ = build_engine(
        EngineOptions(
            model=options.model,
            dtype=options.dtype,
            quantization=options.quantization,
            disable_passes=tuple(without),
            enable_prefix_caching=False,
            max_num_seqs=max(options.batch),
            max_num_batched_tokens=max(512, max(options.batch)),
            max_model_len=max(options.prompt, options.prompt_decode + options.steps) + 16,
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
    ratios = sorted(without / present for without, present in zip(*seconds, strict=True))
    return {
        "without_ms": statistics.median(seconds[0]) * 1e3,
        "with_ms": statistics.median(seconds[1]) * 1e3,
        "speedup": statistics.median(ratios),
        "quartile_1": ratios[len(ratios) // 4],
        "quartile_3": ratios[3 * len(ratios) // 4],
    }


if __name__ == "__main__":
    main()
