"""fxlm in process, for `bench/compare.py`. Arguments: checkpoint, settings as JSON."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from protocol import serve

import fxlm
from fxlm.runtime.engine import Engine as Machine
from fxlm.runtime.options import from_mapping
from fxlm.runtime.request import Request
from fxlm.runtime.sampling_params import SamplingParams
from fxlm.runtime.worker import build_engine


class Engine:
    """One engine whose steps are timed one by one."""

    version = fxlm.__version__
    keeps_prefixes = True

    def __init__(self, model: str, settings: dict[str, object]) -> None:
        self.engine, self.plan, _ = build_engine(from_mapping({"model": model, **settings}))
        self.count = 0

    def prefill(self, prompt: list[int]) -> float:
        """See `protocol.Engine`."""
        self._add(self.engine, prompt, 1)
        started = time.perf_counter()
        while self.engine.has_unfinished():
            self.engine.step()
        return time.perf_counter() - started

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """See `protocol.Engine`."""
        for prompt in prompts:
            self._add(self.engine, prompt, steps + 1)
        made = 0
        while made < len(prompts):
            made += sum(len(output.token_ids) for output in self.engine.step())
        seconds = []
        while self.engine.has_unfinished():
            started = time.perf_counter()
            count = sum(len(output.token_ids) for output in self.engine.step())
            if count == len(prompts):
                seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)

    def _add(self, engine: Machine, prompt: list[int], tokens: int) -> None:
        self.count += 1
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        engine.add_request(
            Request(request_id=str(self.count), prompt_token_ids=prompt, params=params)
        )


def main() -> None:
    """Serve the comparison."""
    model, settings = sys.argv[1], json.loads(sys.argv[2])
    config = json.loads((Path(model) / "config.json").read_text())
    serve(lambda: Engine(model, settings), config["vocab_size"])


if __name__ == "__main__":
    main()
