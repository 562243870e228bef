"""transformers' own model and cache, for `bench/compare.py`. Arguments: checkpoint, settings.

The loop is that of ``generate`` with greedy decoding, without its bookkeeping: one forward pass a
token over the dynamic cache, logits of the last position only.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from protocol import serve


class Engine:
    """A bfloat16 model on the CPU."""

    keeps_prefixes = False

    def __init__(self, model: str) -> None:
        import torch
        import transformers

        self.version = str(transformers.__version__)
        self._torch: Any = torch
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        self._model: Any = loaded.eval()

    def prefill(self, prompt: list[int]) -> float:
        """See `protocol.Engine`."""
        started = time.perf_counter()
        self._forward(self._torch.tensor([prompt]), None)
        return time.perf_counter() - started

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """See `protocol.Engine`."""
        token, cache = self._forward(self._torch.tensor(prompts), None)
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            token, cache = self._forward(token, cache)
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)

    def _forward(self, ids: Any, cache: Any) -> tuple[Any, Any]:
        with self._torch.inference_mode():
            made = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return made.logits[:, -1].argmax(-1, keepdim=True), made.past_key_values


def main() -> None:
    """Serve the comparison."""
    model = sys.argv[1]
    config = json.loads((Path(model) / "config.json").read_text())
    serve(lambda: Engine(model), config["vocab_size"])


if __name__ == "__main__":
    main()
