"""Requests of random tokens for an engine in this process; what benches of a whole model share.

Not here: the machine, tables and results (`common`), servers (`servers`).
"""

from __future__ import annotations

import torch

from fxlm.runtime.engine import Engine
from fxlm.runtime.request import Request
from fxlm.runtime.sampling_params import SamplingParams


def submit(engine: Engine, count: int, prompt: int, tokens: int) -> None:
    """Add ``count`` requests of ``prompt`` random tokens, each to generate ``tokens`` greedily."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    generator = torch.Generator().manual_seed(count)
    for index in range(count):
        ids = torch.randint(3, engine.spec.vocab_size, (prompt,), generator=generator).tolist()
        engine.add_request(Request(request_id=str(index), prompt_token_ids=ids, params=params))


def begin_decoding(engine: Engine, count: int, prompt: int, tokens: int) -> None:
    """As `submit`, and step until every sequence has its first token."""
    submit(engine, count, prompt, tokens)
    made = 0
    while made < count:
        made += sum(len(output.token_ids) for output in engine.step())


def finish(engine: Engine) -> None:
    """Step until nothing is left."""
    while engine.has_unfinished():
        engine.step()
