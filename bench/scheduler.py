"""Host time of a step: scheduler, batch and engine over a worker that computes nothing.

    python bench/scheduler.py [--output bench/results/scheduler.json]

Prints, per number of running sequences, the median and the 99th percentile of the milliseconds
that the host spends a decode step, by part (the last is encoding the outputs for the wire); then
the same with thousands of requests waiting. The targets are 0.3 ms at batch 1 and 1.5 ms at
batch 128.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

from fxlm.runtime.batch import Batch
from fxlm.runtime.engine import Engine, EngineConfig
from fxlm.runtime.messages import Output, Tokens, encode
from fxlm.runtime.request import Request
from fxlm.runtime.sampling_params import SamplingParams
from fxlm.runtime.step import Done, StepResult, WorkerSpec

CASES = ((1, 0), (8, 0), (32, 0), (128, 0), (256, 0), (128, 1_000), (128, 10_000))
PROMPT = 200  # tokens
WARM = 20  # steps left out
COLUMNS = ("plan", "fill", "commit", "encode", "total", "total_p99")


class NullWorker:
    """Answers token 5 to everything."""

    tier = "interpreted"
    depth = 1

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec

    def launch(self, batch: Batch) -> Done:
        return Done(StepResult([5] * batch.sizes.rows))

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        raise AssertionError(copies)


def make(num_seqs: int, steps: int) -> Engine:
    spec = WorkerSpec(
        num_blocks=num_seqs * (PROMPT + steps + 32) // 16 + num_seqs + 2,
        block_size=16,
        max_num_batched_tokens=max(2048, num_seqs),
        max_num_seqs=num_seqs,
        max_model_len=4096,
        vocab_size=128_000,
    )
    return Engine(NullWorker(spec), EngineConfig())


def measure(num_seqs: int, num_waiting: int, steps: int, penalties: bool) -> dict[str, Any]:
    """One row of the table."""
    engine = make(num_seqs, steps)
    params = SamplingParams(max_tokens=None, frequency_penalty=0.5 if penalties else 0.0)
    for number in range(num_seqs + num_waiting):
        prompt = [(number * 7 + i) % 1000 for i in range(PROMPT)]
        engine.add_request(Request(request_id=f"r{number}", prompt_token_ids=prompt, params=params))
    while any(sequence.num_output == 0 for sequence in engine.scheduler.running) or (
        len(engine.scheduler.running) < num_seqs
    ):
        engine.step()
    times: dict[str, list[float]] = {
        "plan": [],
        "fill": [],
        "commit": [],
        "encode": [],
        "total": [],
    }
    for step in range(steps):
        marks = [time.perf_counter()]
        plan = engine.plan()
        marks.append(time.perf_counter())
        engine.batch.fill(plan)
        engine.batch.tensors()
        marks.append(time.perf_counter())
        result = engine.worker.launch(engine.batch).result()
        begin = time.perf_counter()
        outputs: list[Output] = []
        engine.commit(plan, result, outputs)
        committed = time.perf_counter()
        encode(Tokens(outputs))
        end = time.perf_counter()
        assert len(plan.decodes) == num_seqs, len(plan.decodes)
        if step >= WARM:
            parts = [marks[1] - marks[0], marks[2] - marks[1], committed - begin, end - committed]
            for name, value in zip(times, [*parts, sum(parts)], strict=True):
                times[name].append(value * 1e3)
    row: dict[str, Any] = {"running": num_seqs, "waiting": num_waiting, "penalties": penalties}
    for name, values in times.items():
        row[f"{name}_ms"] = statistics.median(values)
    row["total_p99_ms"] = statistics.quantiles(times["total"], n=100)[98]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="steps measured per case")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON here")
    options = parser.parse_args()
    print(
        f"{'running':>8}{'waiting':>8}{'pen.':>6}{'plan':>9}{'fill':>9}{'commit':>9}{'encode':>9}",
        end="",
    )
    print(f"{'total':>9}{'p99':>9}   host ms per decode step, median")
    rows = []
    for num_seqs, num_waiting in CASES:
        for penalties in (False, True) if num_waiting == 0 else (False,):
            row = measure(num_seqs, num_waiting, options.steps, penalties)
            rows.append(row)
            times = [row[f"{name}_ms"] for name in COLUMNS]
            print(f"{num_seqs:8}{num_waiting:8}{'yes' if penalties else 'no':>6}", end="")
            print("".join(f"{value:9.3f}" for value in times), flush=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        about = {"python": platform.python_version(), "machine": platform.processor()}
        options.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
