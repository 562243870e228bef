"""vLLM in process, for `bench/compare.py`. Arguments: checkpoint, settings as JSON.

Run by the Python of vLLM's own environment. The engine core runs in this process
(``VLLM_ENABLE_V1_MULTIPROCESSING=0``), so that its steps can be timed one by one as fxlm's are.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from protocol import serve

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0-1")


class Engine:
    """An `LLM` whose engine is stepped by hand."""

    keeps_prefixes = True

    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        import vllm

        self.version = str(vllm.__version__)
        self._params = vllm.SamplingParams
        self._llm = vllm.LLM(model=model, dtype="bfloat16", disable_log_stats=True, **settings)
        self._count = 0

    def prefill(self, prompt: list[int]) -> float:
        """See `protocol.Engine`."""
        self._add(prompt, 1)
        started = time.perf_counter()
        self._run()
        return time.perf_counter() - started

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """See `protocol.Engine`."""
        core = self._llm.llm_engine
        for prompt in prompts:
            self._add(prompt, steps + 1)
        lengths: dict[str, int] = {}
        while len(lengths) < len(prompts):
            self._note(lengths, core.step())
        seconds = []
        while core.has_unfinished_requests():
            before = dict(lengths)
            started = time.perf_counter()
            outputs = core.step()
            elapsed = time.perf_counter() - started
            self._note(lengths, outputs)
            if len(outputs) == len(prompts) and all(lengths[k] > before[k] for k in before):
                seconds.append(elapsed)
        return statistics.median(seconds)

    def _note(self, lengths: dict[str, int], outputs: list[Any]) -> None:
        for output in outputs:
            lengths[output.request_id] = len(output.outputs[0].token_ids)

    def _run(self) -> None:
        while self._llm.llm_engine.has_unfinished_requests():
            self._llm.llm_engine.step()

    def _add(self, prompt: list[int], tokens: int) -> None:
        self._count += 1
        params = self._params(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self._llm.llm_engine.add_request(str(self._count), {"prompt_token_ids": prompt}, params)


def main() -> None:
    """Serve the comparison."""
    model, settings = sys.argv[1], json.loads(sys.argv[2])
    config = json.loads((Path(model) / "config.json").read_text())
    serve(lambda: Engine(model, settings), config["vocab_size"])


if __name__ == "__main__":
    main()
