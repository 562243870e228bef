"""What a worker is to the engine: its sizes, what it is given and what it gives back.

Here: the `Worker` protocol and its data. Not here: a worker (``worker``), the tensors of a step
(``batch``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from fxlm.runtime.batch import Batch

DEFAULT_SCORE_ROWS = 64


def most_draft_rows(max_num_seqs: int, max_num_batched_tokens: int, max_drafts: int) -> int:
    """Most drafted tokens of a step: half of its tokens are kept for prompts."""
    return min(max_num_seqs * max_drafts, max_num_batched_tokens // 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """Sizes fixed when the worker is made.

    Args:
        num_blocks: blocks of the KV cache, padding block 0 included.
        block_size: tokens a block.
        max_num_batched_tokens: most tokens (T) of a step.
        max_num_seqs: most sequences (S) of a step.
        max_model_len: most tokens of a sequence, prompt and output.
        vocab_size: token ids are below it.
        max_score_rows: most rows a step may spend on prompt log-probabilities.
        max_drafts: most drafted tokens of a sequence that a step verifies; 0: the graph has no
            verification.
        taps: points that requests may tap, and the shape of a token's row there.
        steered: points that requests may steer, and the size of a vector there.
    """

    num_blocks: int
    block_size: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    vocab_size: int
    max_score_rows: int = DEFAULT_SCORE_ROWS
    max_drafts: int = 0
    taps: dict[str, tuple[int, ...]] = field(default_factory=dict)
    steered: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.num_blocks >= 2, self
        assert min(self.block_size, self.max_num_batched_tokens, self.max_num_seqs) >= 1, self
        assert min(self.vocab_size, self.max_score_rows) >= 1, self
        assert self.max_model_len >= 2, self
        assert self.max_drafts >= 0, self

    @property
    def max_draft_rows(self) -> int:
        """Most drafted tokens of a step."""
        return most_draft_rows(self.max_num_seqs, self.max_num_batched_tokens, self.max_drafts)

    @property
    def max_rows(self) -> int:
        """Most logits rows (R) of a step, which bounds the logits' memory."""
        return self.max_num_seqs + self.max_draft_rows + self.max_score_rows

    @property
    def max_blocks_per_seq(self) -> int:
        """Columns (B) of the widest block table."""
        return -(-self.max_model_len // self.block_size)


@dataclass(slots=True)
class StepResult:
    """Outputs of one step, on the host, a row each.

    Args:
        token_ids: drawn (or scored) token of each row, length R.
        logprobs: float32 [R, L+1] or None when no row asked; column 0 is the token of the row.
        logprob_ids: int64 [R, L+1].
        ranks: int64 [R], rank of the token of the row, 1 = most likely.
        num_accepted: tokens to keep of each group of rows, in order of ``draw_start``; None if
            the graph has no verification: then each group is one row.
        taps: [T,...] of each tapped point, a row a token of the step.
    """

    token_ids: list[int]
    logprobs: npt.NDArray[np.float32] | None = None
    logprob_ids: npt.NDArray[np.int64] | None = None
    ranks: npt.NDArray[np.int64] | None = None
    num_accepted: Sequence[int] | None = None
    taps: dict[str, torch.Tensor] = field(default_factory=dict)


class Pending(Protocol):
    """A step that was launched."""

    def result(self) -> StepResult:
        """Wait until its tokens are on the host. Steps end in the order of their launch."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """A step that was over when its launch returned."""

    value: StepResult

    def result(self) -> StepResult:
        return self.value


class Worker(Protocol):
    """Runs steps.

    `OutOfMemory` raised by `launch` or `copy_blocks` fails the requests of that step; any other
    exception ends the engine.
    """

    @property
    def spec(self) -> WorkerSpec: ...

    @property
    def depth(self) -> int:
        """Most steps that are worth launching before the first one's result is read."""
        ...

    @property
    def tier(self) -> str:
        """What runs its steps: ``compiled`` or ``interpreted`` code."""
        ...

    def launch(self, batch: "Batch") -> Pending:
        """Run the step that ``batch`` holds, or begin to; the batch can then be filled anew."""
        ...

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in every layer, before the next step.

        Destinations are distinct; a source is read before any destination is written.
        """
        ...


class Alarm(Protocol):
    """Watches what a worker consists of, while no step runs."""

    def fileno(self) -> int:
        """A descriptor that is readable once there is trouble."""
        ...

    def trouble(self) -> str | None:
        """What is wrong, for good; None if nothing is."""
        ...
