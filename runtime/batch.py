"""The tensors of a step, allocated once and filled in place.

Here: `Batch`, which turns a plan into the inputs of the step graph. Not here: running it
(``worker``), what is in a plan (``scheduler``).

Each tensor is a prefix of a fixed buffer, contiguous at every size, so that addresses never
change. The block table, the sampling options and the like are kept per slot, and only what
changed since the last step is written; a decode step is then a few gathers over slots.

======================  ========  ===================================================
name                    dtype     shape and meaning
======================  ========  ===================================================
input_ids               int64     [1, T] tokens, sequences one after another
position_ids            int64     [1, T] position of each token in its sequence
slot_mapping            int64     [T] block * block_size + offset the token is written to
query_start             int32     [S+1] prefix sums of tokens per sequence
seq_lens                int32     [S] tokens in the cache after this step
block_table             int32     [S, B] physical blocks, padded with 0
logits_indices          int64     [R] index into T
draft_ids               int64     [R] token drafted for the row's draw; -1: none, its group ends
draw_start              int64     [G] first row of each group that draws for one sequence
sample_floats           float32   [R, 6] temperature, top_p, min_p, repetition, presence, frequency
sample_ints             int64     [R, 5] top_k, seed, counter, num_logprobs, target
adjust_start            int32     [R+1] ranges of the following per row
adjust_ids              int64     [N] token id
adjust_counts           int32     [N] occurrences in the output; 0 prompt only; -1 neither
adjust_bias             float32   [N] added to the logit
======================  ========  ===================================================

Sizes, all at least 1: T tokens, S sequences, R rows, B block columns, N adjust entries, G groups.
N has no bound known beforehand: its buffers double when they are too small, and then move.
``draft_ids`` and ``draw_start`` are there if the worker's graph verifies drafts.
"""

import operator
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fxlm.runtime.adjust import Adjust
from fxlm.runtime.sampling_params import SamplingParams
from fxlm.runtime.scheduler import Chunk, Plan
from fxlm.runtime.sequence import Sequence
from fxlm.runtime.step import WorkerSpec

NUM_FLOATS, NUM_INTS = 6, 5
SEED, COUNTER, NUM_LOGPROBS, TARGET = 1, 2, 3, 4  # columns of sample_ints
SCORE_FLOATS = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0)  # a row that scores a token draws nothing
NO_LOGPROBS = NO_TARGET = NO_DRAFT = -1
MOST_VIEWS = 64  # sizes of steps whose views are kept


class Sizes(NamedTuple):
    """Sizes of the step in the batch."""

    tokens: int = 0
    sequences: int = 0
    rows: int = 0
    blocks: int = 1
    adjusts: int = 1
    groups: int = 1


class Batch:
    """Buffers for the largest step that a worker can run.

    Attributes:
        sizes: of the step that it holds now.
        wants_logprobs: whether a row of it asks for log-probabilities.
        points: tensors of steering, if the graph takes them.
    """

    def __init__(
        self, spec: WorkerSpec, *, pin_memory: bool = False, num_adjusts: int = 1024
    ) -> None:
        self.spec = spec
        self.sizes = Sizes()
        self.wants_logprobs = False
        self.points: dict[str, torch.Tensor] = {}
        self._pin = pin_memory
        self._views: dict[Sizes, dict[str, torch.Tensor]] = {}  # inputs of steps by their sizes
        self._tensors: dict[str, torch.Tensor] = {}
        tokens, seqs, rows = spec.max_num_batched_tokens, spec.max_num_seqs, spec.max_rows
        width = spec.max_blocks_per_seq
        self._input_ids = self._new("input_ids", tokens, np.int64)
        self._position_ids = self._new("position_ids", tokens, np.int64)
        self._slot_mapping = self._new("slot_mapping", tokens, np.int64)
        self._query_start = self._new("query_start", seqs + 1, np.int32)
        self._seq_lens = self._new("seq_lens", seqs, np.int32)
        self._block_table = self._new("block_table", seqs * width, np.int32)
        self._logits_indices = self._new("logits_indices", rows, np.int64)
        self._draft_ids = self._new("draft_ids", rows, np.int64)
        self._draw_start = self._new("draw_start", rows, np.int64)
        self._sample_floats = self._new("sample_floats", rows * NUM_FLOATS, np.float32).reshape(
            rows, NUM_FLOATS
        )
        self._sample_ints = self._new("sample_ints", rows * NUM_INTS, np.int64).reshape(
            rows, NUM_INTS
        )
        self._adjust_start = self._new("adjust_start", rows + 1, np.int32)
        self._make_adjusts(num_adjusts)
        # per slot, in step with the sequence that owns it
        self._owners: list[Sequence | None] = [None] * seqs
        self._table = np.zeros((seqs, width), np.int32)
        self._floats = np.zeros((seqs, NUM_FLOATS), np.float32)
        self._ints = np.zeros((seqs, NUM_INTS), np.int64)
        self._layout: _Layout | None = None  # of the decodes of the last step
        self._num_tabled = 0  # columns of the block table that are as in the last step; 0: none
        self._adjusted = False  # whether a row has entries
        self._iota = np.arange(max(tokens, rows) + 1, dtype=np.int64)
        self._step = _Cursor()

    def _new(self, name: str, size: int, dtype: type[np.generic]) -> npt.NDArray[Any]:
        kind = torch.from_numpy(np.zeros(0, dtype)).dtype
        tensor = torch.zeros(size, dtype=kind, pin_memory=self._pin)
        self._tensors[name] = tensor
        array: npt.NDArray[Any] = tensor.numpy()
        return array

    def _make_adjusts(self, size: int) -> None:
        self._views = {}
        self._adjust_ids = self._new("adjust_ids", size, np.int64)
        self._adjust_counts = self._new("adjust_counts", size, np.int32)
        self._adjust_bias = self._new("adjust_bias", size, np.float32)

    # --- what the worker reads

    def tensors(self) -> dict[str, torch.Tensor]:
        """The inputs of the step by name, as in the table above: views, valid until `fill`."""
        sizes = self.sizes
        views = self._views.get(sizes)
        if views is None:
            if len(self._views) == MOST_VIEWS:
                self._views.clear()
            views = self._views[sizes] = self._view(sizes)
        return self.points | views if self.points else views

    def _view(self, sizes: Sizes) -> dict[str, torch.Tensor]:
        full = self._tensors
        tokens, seqs, rows, entries = sizes.tokens, sizes.sequences, sizes.rows, sizes.adjusts
        inputs = {
            "input_ids": full["input_ids"][:tokens].view(1, tokens),
            "position_ids": full["position_ids"][:tokens].view(1, tokens),
            "slot_mapping": full["slot_mapping"][:tokens],
            "query_start": full["query_start"][: seqs + 1],
            "seq_lens": full["seq_lens"][:seqs],
            "block_table": full["block_table"][: seqs * sizes.blocks].view(seqs, sizes.blocks),
            "logits_indices": full["logits_indices"][:rows],
            "sample_floats": full["sample_floats"][: rows * NUM_FLOATS].view(rows, NUM_FLOATS),
            "sample_ints": full["sample_ints"][: rows * NUM_INTS].view(rows, NUM_INTS),
            "adjust_start": full["adjust_start"][: rows + 1],
            "adjust_ids": full["adjust_ids"][:entries],
            "adjust_counts": full["adjust_counts"][:entries],
            "adjust_bias": full["adjust_bias"][:entries],
        }
        if self.spec.max_drafts:
            inputs["draft_ids"] = full["draft_ids"][:rows]
            inputs["draw_start"] = full["draw_start"][: sizes.groups]
        return inputs

    # --- filling

    def advance(self, token_ids: list[int]) -> None:
        """Turn a step of decodes into the next one, by the tokens that it drew.

        `fill` was told so (``ahead``), and no sequence has penalties or the like.
        """
        assert self._layout is not None, "a step of chunks has no next one"
        count = len(token_ids)
        self._input_ids[:count] = token_ids
        self._position_ids[:count] += 1
        self._seq_lens[:count] += 1
        self._place(self._layout)

    def fill(self, plan: Plan, ahead: int = 0) -> Sizes:
        """Write the inputs of a step; gives its sizes.

        Args:
            plan: of the step.
            ahead: steps that `advance` will make of it; its sequences have blocks for them.
        """
        self._step = _Cursor()
        self.wants_logprobs = False
        longest = 0
        for sequence in plan.decodes:
            if self._owners[sequence.slot] is not sequence or (
                sequence.num_tabled != len(sequence.blocks)
            ):
                self._bind(sequence)
            self.wants_logprobs |= sequence.wants_logprobs
        if plan.decodes:
            longest = self._fill_decodes(plan.decodes)
        else:
            self._layout = None  # chunks write where decodes would
        for chunk in plan.chunks:
            longest = max(longest, self._fill_chunk(chunk))
        longest += ahead
        self._fill_table(plan, longest)
        if not self._step.rows:
            self._fill_idle_row()
        if not self._step.groups:  # scores alone: compiled code wants a group, too
            self._draw_start[0] = 0
        entries = self._fill_adjusts(plan)
        step = self._step
        width, groups = self._width(longest), max(step.groups, 1)
        self.sizes = Sizes(step.tokens, step.sequences, step.rows, width, entries, groups)
        return self.sizes

    def _width(self, longest: int) -> int:
        return max(1, -(-longest // self.spec.block_size))

    def _bind(self, sequence: Sequence) -> None:
        """Bring the slot of a sequence up to date: its options, and the new end of its table."""
        slot = sequence.slot
        row = self._table[slot]
        self._num_tabled = 0
        if self._owners[slot] is not sequence:
            self._owners[slot] = sequence
            self._layout = None
            sequence.num_tabled = 0
            self._floats[slot], self._ints[slot] = _options(sequence)
        if sequence.num_tabled == 0:
            row[:] = 0
        row[sequence.num_tabled : len(sequence.blocks)] = sequence.blocks[sequence.num_tabled :]
        sequence.num_tabled = len(sequence.blocks)

    def _fill_decodes(self, decodes: list[Sequence]) -> int:
        """The token of each and its drafts, a row for each of them; these come first.

        Gives the longest length.
        """
        slots = [sequence.slot for sequence in decodes]
        counts = [1 + len(sequence.drafts) for sequence in decodes]
        layout = self._layout
        if layout is None or layout.slots != slots or layout.counts != counts:
            layout = self._layout = self._lay_out(slots, counts)
        count, seqs = layout.num_tokens, len(decodes)
        computed = [sequence.num_computed for sequence in decodes]
        lengths: list[int] = [*map(operator.add, computed, counts)]
        tokens = [sequence.token_ids[-1] for sequence in decodes]
        positions = self._position_ids[:count]
        if count == seqs:
            positions[:] = computed
        else:
            np.add(np.repeat(computed, counts), layout.offsets, out=positions)
            groups = zip(tokens, decodes, strict=True)
            tokens = [token for last, s in groups for token in (last, *s.drafts)]
            self._draft_ids[: count - 1] = tokens[1:]  # what the row is to draw
            self._draft_ids[layout.ends] = NO_DRAFT
        self._input_ids[:count] = tokens
        self._seq_lens[:seqs] = lengths
        self._place(layout)
        self._step = _Cursor(count, seqs, count, seqs)
        return max(lengths)

    def _place(self, layout: "_Layout") -> None:
        """What follows from positions: where tokens are written, and counters of draws."""
        count = layout.num_tokens
        positions = self._position_ids[:count]
        block, offset = np.divmod(positions, self.spec.block_size)
        first = self._table[layout.rows, block].astype(np.int64) * self.spec.block_size
        np.add(first, offset, out=self._slot_mapping[:count])
        np.add(positions, 1, out=self._sample_ints[:count, COUNTER])

    def _lay_out(self, slots: list[int], counts: list[int]) -> "_Layout":
        """Write what stays the same while the same slots decode with as many drafts."""
        self._num_tabled = 0
        seqs, count = len(slots), sum(counts)
        starts = np.zeros(seqs + 1, np.int64)
        np.cumsum(counts, out=starts[1:])
        rows = np.repeat(slots, counts)
        self._query_start[: seqs + 1] = starts
        self._logits_indices[:count] = self._iota[:count]
        self._draft_ids[:count] = NO_DRAFT
        self._draw_start[:seqs] = starts[:-1]
        self._sample_floats[:count] = self._floats[rows]
        self._sample_ints[:count] = self._ints[rows]
        offsets = self._iota[:count] - np.repeat(starts[:-1], counts)
        return _Layout(slots, counts, count, rows, offsets, starts[1:] - 1)

    def _fill_chunk(self, chunk: Chunk) -> int:
        """Tokens and rows of one chunk; gives the length of its sequence after the step."""
        sequence, step, block_size = chunk.sequence, self._step, self.spec.block_size
        self._bind(sequence)
        begin, end = step.tokens, step.tokens + chunk.num_tokens
        stop = chunk.start + chunk.num_tokens
        positions = self._position_ids[begin:end]
        positions[:] = self._iota[: chunk.num_tokens] + chunk.start
        self._input_ids[begin:end] = sequence.token_ids[chunk.start : stop]
        block = self._table[sequence.slot, positions // block_size].astype(np.int64)
        self._slot_mapping[begin:end] = block * block_size + positions % block_size
        self._query_start[step.sequences] = begin
        self._query_start[step.sequences + 1] = end
        self._seq_lens[step.sequences] = stop
        if chunk.num_scores:
            self._fill_scores(chunk, begin)
        for draw in chunk.draws:
            self._fill_draw(draw, end - 1, stop)
        step.tokens = end
        step.sequences += 1
        return stop

    def _fill_scores(self, chunk: Chunk, begin: int) -> None:
        """Rows that score the tokens of a prompt: the row at position p has target p + 1."""
        sequence, step = chunk.sequence, self._step
        rows = slice(step.rows, step.rows + chunk.num_scores)
        first = chunk.score_start
        self._logits_indices[rows] = self._iota[: chunk.num_scores] + (begin + first - chunk.start)
        self._draft_ids[rows] = NO_DRAFT
        self._sample_floats[rows] = SCORE_FLOATS
        ints = self._sample_ints[rows]
        ints[:] = 0
        ints[:, COUNTER] = self._iota[: chunk.num_scores] + (first + 1)
        ints[:, NUM_LOGPROBS] = sequence.params.prompt_logprobs or 0
        ints[:, TARGET] = sequence.token_ids[first + 1 : first + 1 + chunk.num_scores]
        self.wants_logprobs = True
        step.rows += chunk.num_scores

    def _fill_draw(self, sequence: Sequence, index: int, counter: int) -> None:
        """A row that draws the next token of ``sequence`` from the token at ``index`` of T."""
        if self._owners[sequence.slot] is not sequence:  # a fork, just made
            self._bind(sequence)
        row = self._step.rows
        self._logits_indices[row] = index
        self._draft_ids[row] = NO_DRAFT
        self._draw_start[self._step.groups] = row
        self._sample_floats[row] = self._floats[sequence.slot]
        self._sample_ints[row] = self._ints[sequence.slot]
        self._sample_ints[row, COUNTER] = counter
        self.wants_logprobs |= sequence.wants_logprobs
        self._step.rows += 1
        self._step.groups += 1

    def _fill_idle_row(self) -> None:
        """A step of unfinished prompts draws nothing, but compiled code wants a row: R >= 1."""
        self._logits_indices[0] = 0
        self._draft_ids[0] = NO_DRAFT
        self._sample_floats[0] = SCORE_FLOATS
        self._sample_ints[0] = (0, 0, self._position_ids[0] + 1, NO_LOGPROBS, 0)
        self._step.rows = 1

    def _fill_table(self, plan: Plan, longest: int) -> None:
        width = self._width(longest)
        if width == self._num_tabled and not plan.chunks:
            return
        self._num_tabled = 0 if plan.chunks else width
        slots = [sequence.slot for sequence in plan.decodes]
        slots += [chunk.sequence.slot for chunk in plan.chunks]
        table = self._block_table[: len(slots) * width].reshape(len(slots), width)
        table[:] = self._table[slots, :width]

    def _fill_adjusts(self, plan: Plan) -> int:
        """The sparse lists of every row, in order of rows; gives N."""
        drawing = chain(plan.decodes, (draw for chunk in plan.chunks for draw in chunk.draws))
        if not any(sequence.has_adjust for sequence in drawing):
            if self._adjusted:
                self._adjust_start[:] = 0
                self._adjust_ids[0] = self._adjust_counts[0] = self._adjust_bias[0] = 0
                self._adjusted = False
            return 1
        self._adjusted = True
        rows = self._step.rows
        starts = self._adjust_start[: rows + 1]
        starts[:] = 0
        total = row = 0
        for sequence in plan.decodes:
            total = self._put_adjust(sequence, total)
            row += 1
            starts[row] = total
            if sequence.drafts:
                total = self._put_drafts(sequence, row, total)
                row += len(sequence.drafts)
        for chunk in plan.chunks:
            starts[row : row + chunk.num_scores + 1] = total
            row += chunk.num_scores
            for draw in chunk.draws:
                total = self._put_adjust(draw, total)
                row += 1
                starts[row] = total
        assert max(row, 1) == rows, (row, rows)
        if total == 0:
            self._adjust_ids[0] = self._adjust_counts[0] = self._adjust_bias[0] = 0
        return max(total, 1)

    def _put_adjust(self, sequence: Sequence, begin: int) -> int:
        """Append the entries of a sequence as it is; gives the new end."""
        if not sequence.has_adjust:
            return begin
        adjust = sequence.adjust
        if adjust is None:
            adjust = sequence.adjust = Adjust(sequence.request, self.spec.vocab_size)
        return self._put(adjust, adjust.extend(sequence.token_ids[adjust.num_seen :]), begin)

    def _put_drafts(self, sequence: Sequence, row: int, begin: int) -> int:
        """Append the entries as they are after each draft, from ``row`` on; gives the new end."""
        adjust = sequence.adjust
        for number, token in enumerate(sequence.drafts):
            if adjust is not None:
                begin = self._put(adjust, adjust.extend([token]), begin)
            self._adjust_start[row + number + 1] = begin
        if adjust is not None:
            adjust.rewind(sequence.drafts)
        return begin

    def _put(self, adjust: Adjust, size: int, begin: int) -> int:
        """Append the first ``size`` entries; gives the new end."""
        end = begin + size
        if end > len(self._adjust_ids):
            self._grow_adjusts(end)
        self._adjust_ids[begin:end] = adjust.ids[:size]
        self._adjust_counts[begin:end] = adjust.counts[:size]
        self._adjust_bias[begin:end] = adjust.bias[:size]
        return end

    def _grow_adjusts(self, needed: int) -> None:
        old = self._adjust_ids, self._adjust_counts, self._adjust_bias
        self._make_adjusts(max(needed, 2 * len(old[0])))
        new = self._adjust_ids, self._adjust_counts, self._adjust_bias
        for before, after in zip(old, new, strict=True):
            after[: len(before)] = before


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the tokens of decodes are: the slot and the drafts of each say it all.

    Attributes:
        slots: of each sequence.
        counts: tokens of each.
        num_tokens: of all.
        rows: [T] slot of each token.
        offsets: [T] its place in its sequence's group.
        ends: last token of each group.
    """

    slots: list[int]
    counts: list[int]
    num_tokens: int
    rows: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


@dataclass(slots=True)
class _Cursor:
    """How far the step is filled."""

    tokens: int = 0
    sequences: int = 0
    rows: int = 0
    groups: int = 0


def _options(sequence: Sequence) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The constant part of a row that draws: floats and ints (the counter is filled in)."""
    params: SamplingParams = sequence.params
    floats = (
        params.temperature,
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
    )
    logprobs = NO_LOGPROBS if params.logprobs is None else params.logprobs
    return floats, (params.top_k, sequence.seed, 0, logprobs, NO_TARGET)
