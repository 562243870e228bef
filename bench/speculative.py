"""Speculative decoding: what is accepted, what it gains, what a verification costs.

    python bench/speculative.py pair [MODEL] [--rounds 5] [--batch 1 4]
    python bench/speculative.py verify MODEL [--drafts 1 2 4 8]

``pair``: tokens/s of the bundled model (or of the same at the size of a real one, `make_wide`) with
its draft, n-grams and suffixes against plain decoding, on held-out tasks in chat form and on
repetitive text, greedy and at temperature 1. The engines take turns on the same requests in one
process, and every output is compared with plain decoding's. ``verify``: time of a step that
verifies k drafts at batch 1 against a plain step, in turns in one engine; drafts are random, so
none is accepted.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import print_table, write_results
from fxlm import LLM, SamplingParams
from fxlm.models.bundled.tasks import GENERATORS, held_out_tasks, messages
from fxlm.runtime.drafters.base import Drafter
from fxlm.runtime.engine import Engine
from fxlm.runtime.options import from_mapping
from fxlm.runtime.request import Request
from fxlm.runtime.sequence import Sequence
from fxlm.runtime.worker import build_engine

DRAFTERS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "draft_model": {"model": "bundled-draft", "num_speculative_tokens": 3},
    "ngram": {"method": "ngram", "num_speculative_tokens": 6},
    "suffix": {"method": "suffix", "num_speculative_tokens": 8},
}
COPY = "for name in names:\n    print(name)\n    total = total + len(name)\n"
WORDS = ("line", "lines", "count", "value", "values", "item", "items", "size", "data", "path")
TEMPERATURES = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Prompts and how to continue them."""

    name: str
    prompts: list[list[int]]
    max_tokens: int
    ignore_eos: bool


def main() -> None:
    """Parse the command line, measure, print, write."""
    options = _parse()
    rows = _pair(options) if options.what == "pair" else _verify(options)
    print_table(rows, title=f"speculative decoding: {options.what}")
    chosen = {k: v for k, v in vars(options).items() if k != "output"}
    chosen["model"] = Path(options.model).name
    name = f"speculative_{options.what}"
    print(write_results(name, {"rows": rows}, options=chosen, output=options.output))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("pair", "verify"))
    parser.add_argument("model", nargs="?", default="bundled")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each engine")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--requests", type=int, default=12, help="of a kind of work")
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=20, help="measured steps a length")
    parser.add_argument("--prompt", type=int, default=256, help="tokens before verifying")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


# --- pair


def _pair(options: argparse.Namespace) -> list[dict[str, object]]:
    rows = []
    number = itertools.count()  # nothing is asked twice, so nobody knows an answer
    for batch in options.batch:
        engines = {name: _open(config, batch, options) for name, config in DRAFTERS.items()}
        for kind, temperature in itertools.product(("answers", "repetitive"), TEMPERATURES):
            turns = range(options.rounds + 1)
            works = [_work(kind, engines["plain"], number, options.requests) for _ in turns]
            rows += _compare(engines, works, temperature, batch)
    return rows


def _open(config: dict[str, Any] | None, batch: int, options: argparse.Namespace) -> LLM:
    """An engine that runs ``batch`` requests at a time."""
    return LLM(
        options.model, speculative_config=config, dtype=options.dtype, threads=options.threads,
        max_num_seqs=batch, max_model_len=1024, kv_cache_memory_bytes=128 << 20,
    )  # fmt: skip


def _work(kind: str, llm: LLM, number: Iterator[int], count: int) -> Work:
    """New requests: answers of a sentence or two, or text that says the same again and again."""
    tokenizer, template = llm.get_tokenizer(), llm._template
    assert template is not None
    if kind == "repetitive":
        copies = [tokenizer.encode(_copies(next(number))) for _ in range(count)]
        return Work(name=kind, prompts=copies, max_tokens=96, ignore_eos=True)
    kinds = list(GENERATORS)
    chats = []
    for index in itertools.islice(number, count):
        (task,) = held_out_tasks(kinds[index % len(kinds)], 1, seed=index)
        text = template.render(messages(task), add_generation_prompt=True)
        chats.append(tokenizer.encode(text, add_special_tokens=False))
    return Work(name=kind, prompts=chats, max_tokens=64, ignore_eos=False)


def _copies(number: int) -> str:
    """A few lines of code four times, with names of their own."""
    words = random.Random(number).sample(WORDS, 3)
    block = COPY
    for old, new in zip(("names", "name", "total"), words, strict=True):
        block = block.replace(old, new)
    return f"# part {number}\n" + block * 4


def _compare(
    engines: dict[str, LLM], works: list[Work], temperature: float, batch: int
) -> list[dict[str, object]]:
    rates: dict[str, list[float]] = {name: [] for name in engines}
    counts = {name: [0, 0, 0] for name in engines}
    for turn, work in enumerate(works):  # the first warms up
        wanted: list[list[int]] = []
        for name, llm in engines.items():
            before = _totals(llm.engine)
            tokens, seconds = _run(llm, work, temperature)
            wanted = wanted or tokens
            assert tokens == wanted, f"{name} gave other tokens than plain decoding"
            if turn:
                rates[name].append(sum(map(len, tokens)) / seconds)
                after = _totals(llm.engine)
                counts[name] = [a + y - x for a, x, y in zip(counts[name], before, after,
                                                             strict=True)]  # fmt: skip
    plain = rates["plain"]
    rows: list[dict[str, object]] = []
    for name, found in rates.items():
        drafts, drafted, accepted = counts[name]
        ratio = statistics.median(f / p for f, p in zip(found, plain, strict=True))
        rows.append({
            "work": works[0].name, "temperature": temperature, "batch": batch, "drafter": name,
            "tokens_per_s": statistics.median(found), "speedup": ratio,
            "drafts": drafts, "drafted": drafted, "accepted": accepted,
            "acceptance": accepted / drafted if drafted else None,
        })  # fmt: skip
    return rows


def _run(llm: LLM, work: Work, temperature: float) -> tuple[list[list[int]], float]:
    """Complete all prompts; gives tokens and seconds."""
    params = [
        SamplingParams(
            temperature=temperature, seed=seed, max_tokens=work.max_tokens,
            ignore_eos=work.ignore_eos, detokenize=False,
        )
        for seed in range(len(work.prompts))
    ]  # fmt: skip
    started = time.perf_counter()
    made = llm.generate(work.prompts, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in made], time.perf_counter() - started


def _totals(engine: Engine) -> tuple[int, int, int]:
    stats = engine.stats()
    return stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens


# --- verify


class Random(Drafter):
    """Random tokens, as many as it is told."""

    def __init__(self, config: Any, spec: Any) -> None:
        self.length = 0
        self._random = random.Random(0)
        self._vocabulary = spec.vocab_size

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[list[int]]:
        """`length` tokens for each."""
        return [
            [self._random.randrange(3, self._vocabulary) for _ in range(self.length)]
            for _ in sequences
        ]


def _verify(options: argparse.Namespace) -> list[dict[str, object]]:
    most = max(options.drafts)
    lengths = [0, *options.drafts]
    config = {
        "method": "custom_class", "model": f"{__file__}:Random",
        "num_speculative_tokens": most, "adaptive": False,
    }  # fmt: skip
    steps = len(lengths) * (options.steps + 2)
    values = {
        "model": options.model, "threads": options.threads, "max_num_seqs": 1,
        "max_model_len": options.prompt + 2 * steps + most + 16, "enable_prefix_caching": False,
        "speculative_config": config,
    }  # fmt: skip
    engine, _, _ = build_engine(from_mapping(values))
    seconds = _step_times(engine, lengths, options)
    plain = statistics.median(seconds[0])
    return [
        {
            "drafts": length, "step_ms": 1e3 * statistics.median(found),
            "times_plain": statistics.median(
                f / p for f, p in zip(found, seconds[0], strict=True)
            ),
            "median_ratio": statistics.median(found) / plain,
        }
        for length, found in seconds.items()
    ]  # fmt: skip


def _step_times(
    engine: Engine, lengths: list[int], options: argparse.Namespace
) -> dict[int, list[float]]:
    """Seconds of steps of the worker, one of each length in turn."""
    assert engine.speculator is not None
    drafter: Any = engine.speculator.drafter.inner  # type: ignore[union-attr]
    generator = random.Random(1)
    prompt = [generator.randrange(3, engine.spec.vocab_size) for _ in range(options.prompt)]
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    engine.add_request(Request(request_id="0", prompt_token_ids=prompt, params=params))
    while not engine.stats().generation_tokens:
        engine.step()
    seconds: dict[int, list[float]] = {length: [] for length in lengths}
    for turn in range(options.steps + 2):  # two warm up
        for length in lengths:
            drafter.length = length
            plan = engine.plan()
            assert plan.num_tokens == 1 + length, plan
            started = time.perf_counter()
            result = engine.launch(plan).result()
            if turn >= 2:
                seconds[length].append(time.perf_counter() - started)
            engine.commit(plan, result, [])
    return seconds


if __name__ == "__main__":
    main()
