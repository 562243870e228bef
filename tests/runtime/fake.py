"""A model without weights that notices every mistake of the scheduler.

Its cache keeps, per slot, the token and the position that were written there. The next token is
a hash of the prefix as *found in the cache through the block table*, so a wrong block, a wrong
slot, a missed copy or a stale prefix gives another token (or fails an assertion at once).
"""

import hashlib
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fxlm.runtime.batch import COUNTER, NUM_LOGPROBS, SEED, TARGET, Batch
from fxlm.runtime.drafters.base import Drafter
from fxlm.runtime.engine import Engine, EngineConfig
from fxlm.runtime.lengths import Lengths
from fxlm.runtime.request import Request
from fxlm.runtime.sequence import Sequence, derive_seed
from fxlm.runtime.speculator import Speculator
from fxlm.runtime.step import StepResult, WorkerSpec

VOCAB = 256
MAX_LOGPROBS = 20


def spec(**changes: int) -> WorkerSpec:
    """A small worker; ``changes`` name other sizes."""
    sizes: dict[str, Any] = {
        "num_blocks": 64,
        "block_size": 4,
        "max_num_batched_tokens": 32,
        "max_num_seqs": 8,
        "max_model_len": 64,
        "vocab_size": VOCAB,
    }
    return WorkerSpec(**{**sizes, **changes})


def draw(prefix: list[int], seed: int, banned: frozenset[int] = frozenset()) -> int:
    """Next token after ``prefix``; ``seed`` is 0 for a greedy one."""
    for attempt in range(1000):
        text = f"{prefix}|{seed}|{attempt}"
        token = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % VOCAB
        if token not in banned:
            return token
    raise AssertionError("everything is banned")


def score(prefix: list[int], token: int) -> float:
    """Log-probability of a token."""
    digest = hashlib.sha256(f"{prefix}>{token}".encode()).digest()
    return -float(np.float32(int.from_bytes(digest[:2], "big") / 256))


def expect(request: Request, index: int = 0, max_model_len: int = 64) -> list[int]:
    """The tokens that a right engine gives to completion ``index``."""
    params = request.params
    seed = 0
    if not params.is_greedy:
        assert params.seed is not None
        seed = derive_seed(params.seed, index)
    stops = set(params.stop_token_ids or ())
    bans = stops | set(request.eos_token_ids)
    if not params.ignore_eos:
        stops |= set(request.eos_token_ids)
    tokens, output = list(request.prompt_token_ids), []
    limit = max_model_len if params.max_tokens is None else params.max_tokens
    while len(output) < limit and len(tokens) < max_model_len:
        banned = frozenset(bans) if len(output) < params.min_tokens else frozenset()
        output.append(draw(tokens, seed, banned))
        tokens.append(output[-1])
        if output[-1] in stops and len(output) > params.min_tokens:
            break
    return output


class FakeStep:
    """A step whose result is read in the order of launches."""

    def __init__(self, worker: "FakeWorker", value: StepResult) -> None:
        self.worker = worker
        self.value = value

    def result(self) -> StepResult:
        assert self.worker.flying.pop(0) is self
        return self.value


class FakeWorker:
    """Runs a batch on the fake model.

    Args:
        sizes: of the worker.
        delay_s: how long a step takes at least (a stand-in for compute in tests of processes).
        die_at: step at which the process exits without a word.
        fault: exceptions to raise, by step number.
        depth: steps that may be launched before the first one's result is read.
    """

    def __init__(
        self,
        sizes: WorkerSpec,
        *,
        delay_s: float = 0.0,
        die_at: int = -1,
        fault: dict[int, Exception] | None = None,
        depth: int = 1,
    ) -> None:
        self.spec = sizes
        self.depth = depth
        self.flying: list[FakeStep] = []
        self.most_flying = 0
        self.tier = "interpreted"
        self.tokens = np.full(sizes.num_blocks * sizes.block_size, -1, np.int64)
        self.positions = self.tokens.copy()
        self.num_steps = 0
        self.num_tokens = 0
        self.num_copies = 0
        self.fault = fault or {}
        self._delay_s = delay_s
        self._die_at = die_at

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        size = self.spec.block_size
        assert len({target for _, target in copies}) == len(copies)
        for kept in (self.tokens, self.positions):
            blocks = kept.reshape(-1, size)
            blocks[[target for _, target in copies]] = blocks[[source for source, _ in copies]]
        self.num_copies += len(copies)

    def launch(self, batch: Batch) -> "FakeStep":
        assert len(self.flying) < self.depth
        self.flying.append(FakeStep(self, self.run(batch)))
        self.most_flying = max(self.most_flying, len(self.flying))
        return self.flying[-1]

    def run(self, batch: Batch) -> StepResult:
        self.num_steps += 1
        if self._delay_s:
            time.sleep(self._delay_s)
        if self.num_steps == self._die_at:
            os._exit(9)
        if self.num_steps in self.fault:
            raise self.fault[self.num_steps]
        arrays = {name: tensor.numpy() for name, tensor in batch.tensors().items()}
        self._check(arrays, batch)
        written = arrays["slot_mapping"]
        self.tokens[written] = arrays["input_ids"][0]
        self.positions[written] = arrays["position_ids"][0]
        self.num_tokens += len(written)
        rows = [self._row(arrays, row) for row in range(len(arrays["logits_indices"]))]
        result = StepResult([token for token, _ in rows])
        if self.spec.max_drafts:
            result.num_accepted = self._accept(arrays, result.token_ids)
        if batch.wants_logprobs:
            self._score(result, arrays, [prefix for _, prefix in rows])
        return result

    def _accept(self, arrays: dict[str, Any], tokens: Any) -> list[int]:
        """Tokens to keep of each group, by the definition."""
        drafts, indices = arrays["draft_ids"], arrays["logits_indices"]
        accepted = []
        for start in arrays["draw_start"].tolist():
            row = start
            while tokens[row] == drafts[row]:
                row += 1
                assert indices[row] == indices[row - 1] + 1, "a group is not in one piece"
                assert arrays["input_ids"][0][indices[row]] == drafts[row - 1]
            accepted.append(row - start + 1)
        return accepted

    def _check(self, arrays: dict[str, Any], batch: Batch) -> None:
        sizes, limit = batch.sizes, self.spec
        assert 1 <= sizes.tokens <= limit.max_num_batched_tokens
        assert 1 <= sizes.sequences <= limit.max_num_seqs
        assert 1 <= sizes.rows <= limit.max_rows
        assert sizes.rows == len(arrays["logits_indices"])
        assert all(tensor.is_contiguous() for tensor in batch.tensors().values())
        starts = arrays["query_start"]
        assert starts[0] == 0
        assert starts[-1] == sizes.tokens
        assert (np.diff(starts) >= 1).all()
        slots = arrays["slot_mapping"]
        assert len(set(slots.tolist())) == len(slots), "two tokens written to one slot"
        assert slots.min() >= limit.block_size, "written to the padding block"
        last = arrays["position_ids"][0][starts[1:] - 1]
        assert (arrays["seq_lens"] == last + 1).all()
        used = np.arange(sizes.blocks) < -(-arrays["seq_lens"][:, None] // limit.block_size)
        assert ((arrays["block_table"] != 0) >= used).all(), "a block is missing"

    def _row(self, arrays: dict[str, Any], row: int) -> tuple[int, list[int]]:
        """Token of a row and the prefix it was drawn after, read from the cache."""
        index = arrays["logits_indices"][row]
        owner = int(np.searchsorted(arrays["query_start"], index, side="right")) - 1
        length = int(arrays["position_ids"][0][index]) + 1
        position = np.arange(length)
        block = arrays["block_table"][owner][position // self.spec.block_size].astype(np.int64)
        slots = block * self.spec.block_size + position % self.spec.block_size
        assert (self.positions[slots] == position).all(), "the cache holds other positions"
        prefix = self.tokens[slots].tolist()
        ints, floats = arrays["sample_ints"][row], arrays["sample_floats"][row]
        assert ints[COUNTER] == length
        if ints[TARGET] >= 0:
            return int(ints[TARGET]), prefix
        seed = 0 if floats[0] == 0.0 else int(ints[SEED])
        begin, end = arrays["adjust_start"][row : row + 2]
        banned = arrays["adjust_ids"][begin:end][np.isneginf(arrays["adjust_bias"][begin:end])]
        return draw(prefix, seed, frozenset(banned.tolist())), prefix

    def _score(self, result: StepResult, arrays: dict[str, Any], prefixes: list[list[int]]) -> None:
        shape = len(prefixes), MAX_LOGPROBS + 1
        result.logprobs = np.full(shape, np.nan, np.float32)
        result.logprob_ids = np.full(shape, -1, np.int64)
        result.ranks = np.zeros(shape[0], np.int64)
        for row, prefix in enumerate(prefixes):
            count = int(arrays["sample_ints"][row][NUM_LOGPROBS])
            ids = [result.token_ids[row], *range(max(count, 0))]
            result.logprob_ids[row, : len(ids)] = ids
            result.logprobs[row, : len(ids)] = [score(prefix, token) for token in ids]
            result.ranks[row] = 7


class FakeDrafter(Drafter):
    """Knows the fake model; ``wrong`` says which guesses are spoilt.

    Args:
        wrong: called with the prefix; a spoilt guess, and what follows it, is another token.
        most: tokens a draft, if fewer than asked for.
    """

    def __init__(self, wrong: Callable[[list[int]], bool], most: int = 99) -> None:
        self.wrong = wrong
        self.most = most
        self.alive: set[Sequence] = set()

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[list[int]]:
        self.alive |= set(sequences)
        return [self._guess(s, min(n, self.most)) for s, n in zip(sequences, limits, strict=True)]

    def _guess(self, sequence: Sequence, limit: int) -> list[int]:
        prefix = list(sequence.token_ids)
        seed = 0 if sequence.params.is_greedy else sequence.seed
        for _ in range(limit):
            token = draw(prefix, seed)
            prefix.append((token + 1) % VOCAB if self.wrong(prefix) else token)
        return prefix[len(sequence.token_ids) :]

    def finish(self, sequence: Sequence) -> None:
        self.alive.discard(sequence)


def speculating(worker: FakeWorker, drafter: Drafter, config: EngineConfig) -> Engine:
    """An engine that drafts as much as the worker takes."""
    lengths = Lengths(worker.spec.max_drafts, adaptive=False)
    return Engine(worker, config, Speculator(drafter, lengths))


def make_engine(
    sizes: dict[str, int] | None = None,
    config: dict[str, Any] | None = None,
    **worker: Any,
) -> Engine:
    """Factory named by service tests."""
    return Engine(FakeWorker(spec(**(sizes or {})), **worker), EngineConfig(**(config or {})))
