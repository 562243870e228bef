"""One sequence: its tokens, how many of them are in the cache, and the blocks that hold them.

Not here: when it runs (``scheduler``), what it writes into a batch (``batch``).
"""

import enum
import hashlib
import struct

import numpy as np
import numpy.typing as npt

from fxlm.runtime.adjust import Adjust, adjusts
from fxlm.runtime.request import Request

NO_SLOT = -1


class Status(enum.IntEnum):
    WAITING = 0  # holds no block
    RUNNING = 1  # holds blocks and a slot
    FINISHED = 2  # holds nothing, and never will


class Sequence:
    """One completion of a request.

    Attributes:
        order: number of its request in order of arrival.
        token_ids: prompt and output. ``len(token_ids) - num_computed`` tokens are still to run.
        drafts: guesses of the next tokens; the next step runs and verifies as many as fit.
        num_computed: leading tokens whose keys and values are in the cache.
        num_scored: leading prompt tokens that have their log-probability (the first needs none).
        blocks: physical blocks, in order; their number times the block size >= ``num_computed``.
        digests: digests of the leading full blocks known so far; outlive preemption.
        num_tapped: leading positions whose hidden states were told, or need not be.
        tapped: rows of taps to be told with the next token.
        num_tabled: leading entries of ``blocks`` that the batch has in its table.
        slot: row of the batch's cached tables; `NO_SLOT` unless running.
        stop_ids: token that ends the output -> stop reason reported.
        max_total: it ends at this many tokens.
        num_forks: completions of the same prompt still to be split off.
        flying: it has a part in a step that was launched and not committed.
        adjust: penalties and biases, made by the batch when first needed.
    """

    __slots__ = (
        "adjust",
        "blocks",
        "digests",
        "drafts",
        "flying",
        "has_adjust",
        "index",
        "max_total",
        "min_total",
        "num_cached",
        "num_computed",
        "num_forks",
        "num_preemptions",
        "num_prompt",
        "num_scored",
        "num_tabled",
        "num_tapped",
        "order",
        "params",
        "prompt_logprobs",
        "request",
        "scheduled",
        "seed",
        "slot",
        "status",
        "stop_ids",
        "tapped",
        "token_ids",
        "wants_logprobs",
    )

    def __init__(
        self, request: Request, *, order: int, seed: int, max_model_len: int, index: int = 0
    ) -> None:
        params = request.params
        self.request = request
        self.params = params
        self.index = index
        self.order = order
        self.seed = seed
        self.token_ids = list(request.prompt_token_ids)
        self.drafts: list[int] = []
        self.num_prompt = len(self.token_ids)
        self.num_computed = 0
        self.num_scored = 1 if params.prompt_logprobs is not None else self.num_prompt
        self.num_cached = -1  # not looked up yet
        self.num_preemptions = 0
        self.num_forks = params.n - 1 if index == 0 else 0
        self.scheduled = 0.0
        self.status = Status.WAITING
        self.flying = False
        self.slot = NO_SLOT
        self.blocks: list[int] = []
        self.digests: list[bytes] = []
        self.num_tabled = 0
        self.prompt_logprobs: list[list[tuple[int, float, int]]] = []
        self.num_tapped = 0 if params.tap_prompt else self.num_prompt - 1
        self.tapped: dict[str, list[npt.NDArray[np.float32]]] = {}
        self.wants_logprobs = params.logprobs is not None
        self.stop_ids = _stop_ids(request)
        limit = max_model_len if params.max_tokens is None else self.num_prompt + params.max_tokens
        self.max_total = min(limit, max_model_len)
        self.min_total = self.num_prompt + params.min_tokens
        self.has_adjust = adjusts(params)
        self.adjust: Adjust | None = None

    @property
    def num_pending(self) -> int:
        """Tokens still to run before the next one can be drawn."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def age(self) -> tuple[int, int, int]:
        """Smaller goes first; unique."""
        return self.request.priority, self.order, self.index

    def fork(self, max_model_len: int) -> "Sequence":
        """The next completion of the same prompt, waiting, with a seed of its own."""
        assert self.num_forks > 0, self.num_forks
        index = self.params.n - self.num_forks
        self.num_forks -= 1
        seed = derive_seed(self.seed, index)
        child = Sequence(
            self.request, order=self.order, seed=seed, max_model_len=max_model_len, index=index
        )
        child.num_scored = child.num_prompt  # completion 0 has them
        child.digests = self.digests[:]
        child.num_cached = self.num_cached
        child.scheduled = self.scheduled
        return child


def derive_seed(seed: int, index: int) -> int:
    """Seed of completion ``index``: the request's own for 0, a hash of both for others."""
    if index == 0:
        return seed
    digest = hashlib.sha256(struct.pack("<qq", seed, index)).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _stop_ids(request: Request) -> dict[int, int | None]:
    """Like vLLM: the tokenizer's own end token has no stop reason, others report their id."""
    params = request.params
    stops: dict[int, int | None] = {}
    if not params.ignore_eos:
        stops.update((token, token) for token in request.eos_token_ids)
    stops.update((token, token) for token in params.stop_token_ids or ())
    if not params.ignore_eos and request.eos_token_ids:
        stops[request.eos_token_ids[0]] = None
    return stops
