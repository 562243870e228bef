"""fxlm beside its peers: one run, engines in turn, the machine probed around every block.

    python bench/compare.py CHECKPOINT --engine fxlm \
        --engine vllm=ENV/bin/python --engine hf --engine llama.cpp=BUILD/bin:MODEL.gguf

`bench/peers.md` says how the peers are installed; each is optional and runs in its own
environment (`bench/drivers`). A block is one measurement of one engine; for every row the engines
take turns (A B C A B C ...). The machine is probed before and after each block, and a block in a
bad spell (below ``--good`` of the best probe seen) is measured again: decoding is held against
the read bandwidth, prefill against the peak of bfloat16 products (`peak.py`).
Figures are medians over the good blocks. An engine that takes longer than ``--patience`` seconds
for a block gets fewer of them in that row; how many counted is in the JSON. After ``--budget``
seconds a row ends with the blocks that it has. An engine declines what would take minutes a block
(`DECLINED`); the reason takes the place of its figure.

Rows: prefill-N (one prompt of N tokens), decode-B (batch B, 256-token prompts), context-N (batch
4 over N tokens). Served load is `bench/online.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common import matmul_rate_tflops, print_table, read_bandwidth_gbs, write_results
from peak import best_unit, peak_tops

DRIVERS = Path(__file__).resolve().parent / "drivers"
ROWS = (
    *("prefill-512", "prefill-4096"),
    *("decode-1", "decode-8", "decode-32", "decode-128", "context-8192"),
)
DECLINED = {
    ("hf", "decode-128"): "prefills 32k tokens in each block, minutes",
    ("hf", "context-8192"): "prefills 32k tokens in each block, minutes",
}
PROMPT, STEPS, CONTEXT_BATCH = 256, 16, 4
PROBE_BYTES = 1 << 28


@dataclass
class Peer:
    """A running driver.

    Attributes:
        name: as given on the command line.
        slow: rows in which it is out of patience.
    """

    name: str
    process: subprocess.Popen[str]
    version: str = ""
    ready: float = 0.0
    slow: set[str] = field(default_factory=set)

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """One order, one answer; raises `EOFError` when the driver has died."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """The next line that it writes."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(f"{self.name} ended with {self.process.wait()}; see its log")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(frozen=True)
class Block:
    """Seconds of a prefill or a step, and the limit of its kind around it (see `Machine`)."""

    seconds: float
    limit: float


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a model must move and multiply, from its config.

    Attributes:
        weight_bytes: that a decode step reads, in bfloat16: all but an untied embedding.
        kv_bytes_per_token: in bfloat16.
        layer_macs: multiplications of a token in all layers (the head serves one token).
    """

    vocabulary: int
    weight_bytes: int
    kv_bytes_per_token: int
    layer_macs: int


def main() -> None:
    """Parse the command line, measure, print, write."""
    options = _parse()
    shape = _shape(options.checkpoint)
    peers = [_start(text, options) for text in options.engine]
    machine = Machine(options.good)
    rate = matmul_rate_tflops(torch.bfloat16)
    results = [row for name in options.rows for row in _row(name, peers, machine, shape, options)]
    memory = {p.name: p.ask({"do": "memory"}) for p in peers if p.process.poll() is None}
    for peer in peers:
        peer.process.kill()
    for name in dict.fromkeys(str(r["row"]) for r in results):
        print_table([_shown(r) for r in results if r["row"] == name], title=name)
    document = {
        "model": options.checkpoint.name, "rows": results, "memory": memory,
        "engines": {p.name: {"version": p.version, "load_seconds": p.ready} for p in peers},
        "limits": {
            "read_gbs": machine.best["decode"], "peak_tops": machine.best["prefill"],
            "peak_of": machine.unit, "matmul_tflops": rate, "probes": machine.probes,
        },
        "floor": {"weight_gb": shape.weight_bytes / 1e9},
    }  # fmt: skip
    chosen = {"rows": options.rows, "blocks": options.blocks, "good": options.good}
    path = write_results(f"compare_{options.name}", document, options=chosen)
    print(path)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--engine", action="append", required=True, help="NAME or NAME=PLACE")
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--blocks", type=int, default=5, help="good blocks an engine and row")
    parser.add_argument("--good", type=float, default=0.85, help="share of the best probe")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds of a block")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds of a row's blocks")
    parser.add_argument("--settings", default="{}", help="options of fxlm as JSON")
    parser.add_argument("--name", default="offline", help="of the result file")
    parser.add_argument("--logs", type=Path, default=Path("build/compare"))
    return parser.parse_args()


class Machine:
    """What limits a block, as it is from moment to moment: read bandwidth and bfloat16 peak."""

    def __init__(self, good: float) -> None:
        self.good = good
        self.unit, peak = best_unit("bf16")
        self.best = {"decode": read_bandwidth_gbs(size_bytes=1 << 30), "prefill": peak}
        self.probes: list[dict[str, float]] = []

    def probe(self) -> dict[str, float]:
        """GB/s now (a quarter of a gigabyte, read twice), and 10^12 operations/s."""
        bandwidth = read_bandwidth_gbs(size_bytes=PROBE_BYTES, repeats=2, clock=time.perf_counter)
        found = {"decode": bandwidth, "prefill": peak_tops(self.unit, repeats=2)}
        self.probes.append({kind: round(value, 2) for kind, value in found.items()})
        self.best = {kind: max(self.best[kind], value) for kind, value in found.items()}
        return found

    def is_good(self, kind: str, *probes: dict[str, float]) -> bool:
        """Whether none of these falls off in what bounds a block of ``kind``."""
        worst: float = min(probe[kind] for probe in probes)
        return worst >= self.good * self.best[kind]


# --- engines -----------------------------------------------------------------------------------


def _start(text: str, options: argparse.Namespace) -> Peer:
    name, _, place = text.partition("=")
    command = _command(name, place, options)
    options.logs.mkdir(parents=True, exist_ok=True)
    with (options.logs / f"{options.name}-{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
    peer = Peer(name, process)
    answer = peer.hear()
    peer.version, peer.ready = str(answer["version"]), float(answer["ready"])
    print(f"{name} {peer.version}: ready after {peer.ready:.1f} s", flush=True)
    return peer


def _command(name: str, place: str, options: argparse.Namespace) -> list[str]:
    longest = max(_tokens(row) for row in options.rows)
    batch = max([1, *(int(r.split("-")[1]) for r in options.rows if r.startswith("decode-"))])
    model = str(options.checkpoint)
    if name.startswith("fxlm"):
        settings = {
            "max_num_seqs": batch, "max_model_len": longest + STEPS + 16, "seed": 0,
            **json.loads(options.settings),
        }  # fmt: skip
        python = place or sys.executable
        return [python, str(DRIVERS / "fxlm_driver.py"), model, json.dumps(settings)]
    if name.startswith("vllm"):
        settings = {"max_model_len": longest + STEPS + 16, "max_num_seqs": batch, "seed": 0}
        return [place, str(DRIVERS / "vllm_driver.py"), model, json.dumps(settings)]
    if name.startswith("llama"):
        folder, _, file = place.partition(":")
        vocabulary = str(_shape(options.checkpoint).vocabulary)
        return [sys.executable, str(DRIVERS / "llama_cpp_driver.py"), file, folder, vocabulary]
    if name.startswith("hf"):
        return [place or sys.executable, str(DRIVERS / "hf_driver.py"), model]
    raise SystemExit(f"--engine {name}: known are fxlm, vllm=PYTHON, hf, llama.cpp=FOLDER:FILE")


def _tokens(row: str) -> int:
    kind, _, size = row.partition("-")
    if kind not in ("prefill", "decode", "context") or not re.fullmatch(r"\d+", size):
        raise SystemExit(f"--rows {row}: write prefill-N, decode-BATCH or context-N")
    return PROMPT if kind == "decode" else int(size)


# --- measuring ---------------------------------------------------------------------------------


def _row(
    name: str,
    peers: list[Peer],
    machine: Machine,
    shape: Shape,
    options: argparse.Namespace,
) -> list[dict[str, object]]:
    """Every engine in turn until each has its blocks; a block in a bad spell does not count."""
    order = _order(name)
    blocks: dict[str, list[Block]] = {p.name: [] for p in peers}
    spoilt = dict.fromkeys(blocks, 0)
    faults = {p.name: DECLINED[p.name, name] for p in peers if (p.name, name) in DECLINED}
    for peer in peers:  # compiles, fills prefix caches, touches memory
        if peer.name not in faults:
            _block(peer, order, name, machine, math.inf, faults)
    ends = time.perf_counter() + options.budget
    for _ in range(3 * options.blocks):
        if time.perf_counter() > ends:
            break
        for peer in peers:
            wanted = 2 if name in peer.slow else options.blocks
            if peer.name in faults or len(blocks[peer.name]) >= wanted:
                continue
            block = _block(peer, order, name, machine, options.patience, faults)
            if block is not None:
                blocks[peer.name].append(block)
            else:
                spoilt[peer.name] += 1
    made = [_figures(name, p, blocks[p.name], spoilt[p.name], machine, shape) for p in peers]
    for row in made:
        row["fault"] = faults.get(str(row["engine"]), "")
    _compare(made)
    print(f"{name}: " + ", ".join(_brief(r) for r in made), flush=True)
    return made


def _order(name: str) -> dict[str, Any]:
    kind, _, size = name.partition("-")
    if kind == "prefill":
        return {"do": "prefill", "tokens": int(size)}
    if kind == "decode":
        return {"do": "decode", "batch": int(size), "context": PROMPT, "steps": STEPS}
    return {"do": "decode", "batch": CONTEXT_BATCH, "context": int(size), "steps": STEPS}


def _block(
    peer: Peer, order: dict[str, Any], row: str, machine: Machine, patience: float,
    faults: dict[str, str],
) -> Block | None:  # fmt: skip
    """None: in a bad spell, or without an answer."""
    before, started = machine.probe(), time.perf_counter()
    try:
        answer = peer.ask(order)
    except EOFError as error:
        answer = {"error": str(error)}
    if time.perf_counter() - started > patience:
        peer.slow.add(row)
    if "error" in answer:
        faults[peer.name] = answer["error"]
        return None
    kind, after = str(order["do"]), machine.probe()
    if not machine.is_good(kind, before, after):
        return None
    return Block(float(answer["seconds"]), (before[kind] + after[kind]) / 2)


def _figures(
    name: str, peer: Peer, blocks: list[Block], spoilt: int, machine: Machine, shape: Shape
) -> dict[str, object]:  # fmt: skip
    """``share`` is of the best probe of the run, ``share_then`` of those around each block."""
    row: dict[str, object] = {"row": name, "engine": peer.name, "blocks": len(blocks)}
    row["spoilt"] = spoilt
    if not blocks:
        return row
    seconds = [block.seconds for block in blocks]
    order, median = _order(name), statistics.median(seconds)
    row |= {"seconds": median, "range": [min(seconds), max(seconds)]}
    if order["do"] == "prefill":
        tokens = order["tokens"]
        flops = 2 * shape.layer_macs * tokens
        row |= {
            "tokens_per_s": tokens / median,
            "share": flops / median / 1e12 / machine.best["prefill"],
            "share_then": statistics.median(flops / b.seconds / 1e12 / b.limit for b in blocks),
        }
        return row | {"limit": machine.unit.replace("_", " ")}
    context = order["context"] + STEPS // 2
    moved = shape.weight_bytes + order["batch"] * context * shape.kv_bytes_per_token
    floor = shape.weight_bytes / machine.best["decode"] / 1e9
    row |= {"tokens_per_s": order["batch"] / median, "limit": "read bandwidth"}
    return row | {
        "share": moved / median / 1e9 / machine.best["decode"],
        "share_then": statistics.median(moved / b.seconds / 1e9 / b.limit for b in blocks),
        "times_weight_floor": median / floor,
    }


def _compare(rows: list[dict[str, object]]) -> None:
    """Each engine against the best of the others that is not fxlm."""
    speeds = {str(r["engine"]): r["tokens_per_s"] for r in rows if "tokens_per_s" in r}
    for row in rows:
        others: list[Any] = [
            s for n, s in speeds.items() if n != row["engine"] and not n.startswith("fxlm")
        ]
        own: Any = row.get("tokens_per_s")
        row["times_best_peer"] = own / max(others) if own and others else None


def _shown(row: dict[str, object]) -> dict[str, object]:
    keys = (
        *("engine", "tokens_per_s", "seconds", "share", "share_then", "limit"),
        "times_weight_floor",
        *("times_best_peer", "blocks", "spoilt", "fault"),
    )
    return {key: row.get(key) for key in keys}


def _brief(row: dict[str, object]) -> str:
    speed: Any = row.get("tokens_per_s")
    return f"{row['engine']} {speed:.4g}" if speed else f"{row['engine']} {row['fault'] or '-'}"


def _shape(checkpoint: Path) -> Shape:
    """Of a dense decoder with the fields that Llama and Qwen3 share."""
    config = json.loads((checkpoint / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    dim = config.get("head_dim") or hidden // heads
    kv = config.get("num_key_value_heads") or heads
    attention = hidden * dim * (heads + 2 * kv) + heads * dim * hidden
    layer = attention + 3 * hidden * config["intermediate_size"]
    head = config["vocab_size"] * hidden
    return Shape(
        vocabulary=config["vocab_size"],
        weight_bytes=2 * (layers * layer + head),
        kv_bytes_per_token=2 * 2 * layers * kv * dim,
        layer_macs=layers * layer,
    )


if __name__ == "__main__":
    main()
