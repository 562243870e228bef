"""Fixture prompts, and the inputs of steps that run them alone or batched, whole or by token.

A mode says how the same prompts go through a model; whatever the mode, each token of a prompt
gets one row of log-probabilities, so that modes, stages and dtypes can be compared. Not here:
the comparison (`compare`), what is run (`subjects`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from fxlm.compiler.errors import FxlmError
from fxlm.models.checkpoint import Checkpoint
from fxlm.runtime.check import prompts as random_prompts

Mode = Literal["prefill alone", "decode alone", "prefill batched", "decode batched"]
MODES: tuple[Mode, ...] = get_args(Mode)

TEXTS = (
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "The capital of France is Paris, and the capital of Italy is",
)
LENGTHS = (1, 7, 19, 33)  # of the pseudo-random prompts beside them
# A checkpoint of more bytes than this runs the last text and these lengths: half of the tokens,
# and still a prompt of one token and one that needs a second block.
LARGE = 1 << 30
LARGE_LENGTHS = (1, 33)
NUM_DECODED = 4  # last tokens of a prompt that decode modes run one by one
MAX_TEXT = 48  # tokens
UNBOUNDED = 2 * max(LENGTHS)  # context of a model without one (ALiBi): every prompt is whole
NUM_LOGPROBS = 20
Row = tuple[int, int]  # prompt, position


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Tokens ``[start, start + count)`` of prompt ``prompt``, in one step."""

    prompt: int
    start: int
    count: int


def fixture_prompts(checkpoint: Checkpoint, vocab_size: int, context: int) -> list[list[int]]:
    """Two texts, if the checkpoint has a tokenizer, and fixed pseudo-random ids.

    A checkpoint of more than ``LARGE`` bytes gets fewer.

    Args:
        vocab_size: ids are below it.
        context: tokens that the model was made for; 0 if it has no limit.
    """
    context = context or UNBOUNDED
    large = checkpoint.num_bytes > LARGE
    texts = [ids[: min(MAX_TEXT, context)] for ids in _encoded(checkpoint)]
    known = [ids for ids in texts if ids and max(ids) < vocab_size]
    lengths = LARGE_LENGTHS if large else LENGTHS
    return (known[-1:] if large else known) + random_prompts(vocab_size, context, lengths)


def _encoded(checkpoint: Checkpoint) -> list[list[int]]:
    from fxlm.models.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.open(checkpoint.path)
        return [tokenizer.encode(text) for text in TEXTS]
    except FxlmError:  # a checkpoint without a tokenizer is run on ids alone
        return []


def steps(prompts: Sequence[Sequence[int]], mode: Mode) -> Iterator[tuple[int, list[Chunk]]]:
    """The steps of a mode: (number of the run, chunks). A new run begins with an empty cache."""
    everyone = list(range(len(prompts)))
    groups = [everyone] if mode.endswith("batched") else [[i] for i in everyone]
    for number, group in enumerate(groups):
        if mode.startswith("prefill"):
            yield number, [Chunk(prompt=i, start=0, count=len(prompts[i])) for i in group]
        else:
            yield from ((number, chunks) for chunks in _decode(prompts, group))


def _decode(prompts: Sequence[Sequence[int]], group: list[int]) -> Iterator[list[Chunk]]:
    """All but the last tokens at once, then one a step; short prompts join late."""
    heads = {i: max(0, len(prompts[i]) - NUM_DECODED) for i in group}
    first = [Chunk(prompt=i, start=0, count=heads[i]) for i in group if heads[i]]
    if first:
        yield first
    for place in range(NUM_DECODED):
        now = [i for i in group if heads[i] + place < len(prompts[i])]
        if now:
            yield [Chunk(prompt=i, start=heads[i] + place, count=1) for i in now]


def is_scored(mode: Mode, chunk: Chunk) -> bool:
    """Whether the rows of a chunk count: in decode modes, those of single tokens."""
    return mode.startswith("prefill") or chunk.count == 1


def rows_of(chunks: Sequence[Chunk]) -> list[Row]:
    """The row of each token of a step, in order."""
    return [(c.prompt, c.start + i) for c in chunks for i in range(c.count)]


def step_inputs(
    prompts: Sequence[Sequence[int]],
    chunks: Sequence[Chunk],
    block_size: int,
    steer_size: int = 0,
) -> dict[str, torch.Tensor]:
    """Inputs of one step, every token of which gets logits; see ``docs/architecture.md``.

    Prompt i owns the blocks from 1 + i * width on.
    """
    width = num_columns(prompts, block_size)
    rows = rows_of(chunks)
    count = len(rows)
    slots = [
        (1 + i * width + at // block_size) * block_size + at % block_size for i, at in rows
    ]  # fmt: skip
    table = [[1 + c.prompt * width + b for b in range(width)] for c in chunks]
    starts = torch.tensor([0, *(c.count for c in chunks)]).cumsum(0)
    targets = [prompts[i][at + 1] if at + 1 < len(prompts[i]) else -1 for i, at in rows]
    ints = torch.zeros(count, 5, dtype=torch.int64)
    ints[:, 3], ints[:, 4] = NUM_LOGPROBS, torch.tensor(targets)
    floats = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 0.0]]).repeat(count, 1)
    return {
        "input_ids": torch.tensor([[prompts[i][at] for i, at in rows]]),
        "position_ids": torch.tensor([[at for _, at in rows]]),
        "slot_mapping": torch.tensor(slots),
        "query_start": starts.to(torch.int32),
        "seq_lens": torch.tensor([c.start + c.count for c in chunks], dtype=torch.int32),
        "block_table": torch.tensor(table, dtype=torch.int32),
        "logits_indices": torch.arange(count),
        "sample_floats": floats,
        "sample_ints": ints,
        "adjust_start": torch.zeros(count + 1, dtype=torch.int32),
        "adjust_ids": torch.zeros(1, dtype=torch.int64),
        "adjust_counts": torch.zeros(1, dtype=torch.int32),
        "adjust_bias": torch.zeros(1),
        "draft_ids": torch.full((count,), -1),  # nothing is drafted
        "draw_start": torch.arange(count),
        "steer_table": torch.zeros(1, steer_size),  # row 0: nobody steers
        "steer_rows": torch.zeros(count, dtype=torch.int64),
    }


def num_columns(prompts: Sequence[Sequence[int]], block_size: int) -> int:
    """Blocks of the longest prompt."""
    return -(-max(map(len, prompts)) // block_size)


def num_blocks(prompts: Sequence[Sequence[int]], block_size: int) -> int:
    """Blocks that all prompts need at once, and the padding block 0."""
    return 1 + len(prompts) * num_columns(prompts, block_size)
