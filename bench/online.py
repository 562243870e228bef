"""Load on OpenAI servers: time to first token, time between tokens, goodput.

    python bench/online.py --server fxlm=http://127.0.0.1:8000 --server vllm=http://127.0.0.1:8001 \
        --concurrency 8 --requests 32 --input 128 --output 64
    python bench/online.py --port 8100 --server 'fxlm=fxlm serve MODEL --port 8100' --server ... \
        --rate 2 --duration 30
    python bench/online.py --server ... --chat --concurrency 32 --no-stream --output 16 --wrk

Several servers are loaded in turn, ``--blocks`` times, the others idle meanwhile. A server given
by its command is started for its block, warmed, loaded and ended, so that none shares the machine;
its start to first token and peak memory are in the row, too. With
``--concurrency`` that many requests are always under way; with ``--rate`` they arrive as a
Poisson process with a fixed seed, whatever the server does. Prompts are token ids drawn anew for
every request, so no prefix cache helps; with ``--chat``, they are short questions. Goodput counts
requests within ``--slo-ttft`` and ``--slo-itl`` (its mean). The client streams, and runs on the
same cores as the server (aiohttp: a third of the time of httpx a request); with ``--wrk`` it is
wrk, a hundredth of that, which knows of whole answers alone and asks for ``--duration`` seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

import wrk_load
from common import print_table, write_results
from servers import running

WARM_S = 4


@dataclass
class Timing:
    """What one request saw, in seconds."""

    first: float = 0.0
    gaps: list[float] = field(default_factory=list)
    total: float = 0.0
    tokens: int = 0
    fault: str = ""


def main() -> None:
    """Parse the command line, load the servers in turn, print, write."""
    options = _parse()
    servers = dict(text.split("=", 1) for text in options.server)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
    for block in range(options.blocks):
        for name, place in servers.items():
            row = _block(name, place, block, options)
            print(f"{name}: {row}", flush=True)
            runs[name].append(row)
    rows = [{"server": n, **_medians(r)} for n, r in runs.items()]
    print_table(rows, title=f"medians of {options.blocks} blocks")
    hidden = ("server", "name", "logs")
    chosen = {k: v for k, v in vars(options).items() if k not in hidden}
    document = {"rows": rows, "blocks": runs}
    print(write_results(f"online_{options.name}", document, options=chosen))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--server", action="append", required=True, help="NAME=URL or NAME=COMMAND")
    parser.add_argument("--port", type=int, default=8100, help="on which every command listens")
    parser.add_argument("--logs", type=Path, default=Path("build/compare"))
    parser.add_argument("--chat", action="store_true", help="short questions to /v1/chat")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--rate", type=float, help="requests/s; instead of --concurrency")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--duration", type=float, default=30.0, help="seconds, with --rate")
    parser.add_argument("--input", type=int, default=128, help="prompt tokens")
    parser.add_argument("--output", type=int, default=64, help="tokens generated")
    parser.add_argument("--vocabulary", type=int, default=32000, help="ids are drawn below this")
    parser.add_argument("--wrk", action="store_true", help="load with wrk; goes with --no-stream")
    parser.add_argument("--no-stream", action="store_true", help="whole answers: requests/s only")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--slo-ttft", type=float, default=2.0)
    parser.add_argument("--slo-itl", type=float, default=0.2)
    parser.add_argument("--name", default="load", help="of the result file")
    options = parser.parse_args()
    if options.wrk and (not options.no_stream or options.rate):
        parser.error("--wrk goes with --no-stream and without --rate")
    return options


def _block(name: str, place: str, block: int, options: argparse.Namespace) -> dict[str, Any]:
    seed = 1000 * (block + 2)
    if place.startswith("http"):
        return _warm_and_load(place, options, seed)
    with running(place, options.port, options.logs / f"online-{name}.log") as server:
        row = _warm_and_load(server.url, options, seed)
        start = {"first_token_s": server.first_token, "peak_rss_gb": server.peak_rss_gb()}
        return row | start


def _warm_and_load(url: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One round of as many requests as may run at once goes before the one that counts."""
    if options.wrk:
        return _whole(url, options, seed)
    few = argparse.Namespace(**vars(options))
    few.rate, few.requests = None, options.concurrency
    asyncio.run(_load(url, few, seed + 500))
    return asyncio.run(_load(url, options, seed))


def _whole(url: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    draw, model = random.Random(seed), asyncio.run(_served(url))
    bodies = [_body(model, options, draw) for _ in range(2000)]
    place = url + ("/v1/chat/completions" if options.chat else "/v1/completions")
    wrk_load.load(place, bodies, options.concurrency, WARM_S)
    return wrk_load.load(place, bodies, options.concurrency, round(options.duration))


async def _served(url: str) -> str:
    async with aiohttp.ClientSession(url) as client:
        return await _model(client)


async def _model(client: aiohttp.ClientSession) -> str:
    async with client.get("/v1/models") as answer:
        name: str = (await answer.json())["data"][0]["id"]
        return name


async def _load(url: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    async with aiohttp.ClientSession(
        url, timeout=aiohttp.ClientTimeout(total=600), connector=aiohttp.TCPConnector(limit=0)
    ) as client:
        model = await _model(client)
        count = options.requests if not options.rate else int(options.rate * options.duration)
        bodies = [_body(model, options, draw) for _ in range(max(count, 1))]
        started = time.perf_counter()
        if options.rate:
            timings = await _arrivals(client, bodies, options.rate, draw)
        else:
            timings = await _workers(client, bodies, options.concurrency)
        elapsed = time.perf_counter() - started
    return _figures(timings, elapsed, options)


def _body(model: str, options: argparse.Namespace, draw: random.Random) -> dict[str, Any]:
    common = {
        "model": model, "max_tokens": options.output, "temperature": 0, "ignore_eos": True,
        "stream": not options.no_stream,
    }  # fmt: skip
    if options.chat:
        question = f"What is {draw.randrange(100)} plus {draw.randrange(100)}?"
        return common | {"messages": [{"role": "user", "content": question}]}
    return common | {
        "prompt": [draw.randrange(3, options.vocabulary) for _ in range(options.input)]
    }


async def _workers(
    client: aiohttp.ClientSession, bodies: list[dict[str, Any]], concurrency: int
) -> list[Timing]:
    todo = iter(bodies)

    async def worker() -> list[Timing]:
        return [await _request(client, body) for body in todo]

    made = await asyncio.gather(*(worker() for _ in range(concurrency)))
    return [timing for part in made for timing in part]


async def _arrivals(
    client: aiohttp.ClientSession, bodies: list[dict[str, Any]], rate: float, draw: random.Random
) -> list[Timing]:
    tasks = []
    due = time.perf_counter()
    for body in bodies:
        due += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(_request(client, body)))
    return list(await asyncio.gather(*tasks))


async def _request(client: aiohttp.ClientSession, body: dict[str, Any]) -> Timing:
    timing = Timing()
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    started = last = time.perf_counter()
    try:
        async with client.post(path, json=body) as answer:
            if answer.status != 200:
                timing.fault = f"HTTP {answer.status}: {(await answer.read())[:200]!r}"
                return timing
            if not body["stream"]:
                timing.tokens = json.loads(await answer.read())["usage"]["completion_tokens"]
            else:
                async for line in answer.content:
                    if not line.startswith(b"data: {") or not _has_token(json.loads(line[6:])):
                        continue
                    now = time.perf_counter()
                    if timing.tokens:
                        timing.gaps.append(now - last)
                    else:
                        timing.first = now - started
                    timing.tokens, last = timing.tokens + 1, now
    except (aiohttp.ClientError, TimeoutError) as error:
        timing.fault = f"{type(error).__name__}: {error}"
    timing.total = time.perf_counter() - started
    return timing


def _has_token(chunk: dict[str, Any]) -> bool:
    """Whether it is more than usage or the role that opens a chat answer."""
    deltas = [choice.get("delta", choice) for choice in chunk["choices"]]
    return any("role" not in delta or delta.get("content") for delta in deltas)


def _figures(timings: list[Timing], elapsed: float, options: argparse.Namespace) -> dict[str, Any]:
    good = [t for t in timings if not t.fault]
    tokens = len(good) * options.output if not options.no_stream else sum(t.tokens for t in good)
    row: dict[str, Any] = {
        "requests": len(timings), "failed": len(timings) - len(good), "seconds": elapsed,
        "requests_per_s": len(good) / elapsed, "tokens_per_s": tokens / elapsed,
    }  # fmt: skip
    for timing in timings:
        if timing.fault:
            row["fault"] = timing.fault
    if options.no_stream or not good:
        return row
    gaps = sorted(gap for t in good for gap in t.gaps)
    firsts = sorted(t.first for t in good)
    within = [
        t for t in good
        if t.first <= options.slo_ttft and statistics.fmean(t.gaps or [0.0]) <= options.slo_itl
    ]  # fmt: skip
    return row | {
        "ttft_median": statistics.median(firsts), "ttft_p99": _percentile(firsts, 0.99),
        "itl_median": statistics.median(gaps), "itl_p99": _percentile(gaps, 0.99),
        "goodput_requests_per_s": len(within) / elapsed,
    }  # fmt: skip


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    keys = [k for k, v in rows[0].items() if isinstance(v, int | float)]
    made: dict[str, Any] = {k: statistics.median(r[k] for r in rows if k in r) for k in keys}
    faults = [r["fault"] for r in rows if "fault" in r]
    return made | ({"fault": faults[0]} if faults else {})


if __name__ == "__main__":
    main()
