"""Which sequences run in the next step, with how many tokens and which blocks.

Here: `Scheduler` and its `Plan`. Not here: tensors (``batch``), tokens drawn (``engine``).

There are no phases. A sequence has tokens that are not in the cache yet: all of a fresh prompt,
one while decoding, prompt and output after a preemption. Every step hands out a budget of tokens,
first to sequences that need one (decodes), with the tokens drafted for them as far as budget and
free blocks go, then to the others in chunks, then to waiting ones, oldest first. A waiting
sequence is given the blocks of all its tokens when it is admitted, so that only decoding asks for
more; when there are none, the youngest running sequence gives its own back and waits again, in
front of everyone who came after it. The oldest therefore always goes on, and everyone finishes.

Several steps may be launched before the first is committed (pipeline stages). A sequence is in one
of them at most: while it flies it is neither planned nor preempted, and whoever needs its blocks
waits until it has landed. Each step then takes its share of the sequences that decode.
"""

import heapq
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from fxlm.compiler.errors import InvalidRequest
from fxlm.runtime.block_pool import BlockPool
from fxlm.runtime.sequence import NO_SLOT, Sequence, Status
from fxlm.runtime.step import WorkerSpec

Policy = Literal["fcfs", "priority"]


@dataclass(slots=True)
class Chunk:
    """Tokens ``[start, start + num_tokens)`` of a sequence that is not a decode.

    ``score_start``: position of the first logits row that scores a prompt token, ``num_scores``
    rows. ``draws``: the sequences that draw from the chunk's last token: none, or this one and
    the forks that share its prompt.
    """

    sequence: Sequence
    num_tokens: int
    start: int
    score_start: int = 0
    num_scores: int = 0
    draws: list[Sequence] = field(default_factory=list)


@dataclass(slots=True)
class Plan:
    """One step. Rows and tokens go in the order of ``decodes``, then of ``chunks``.

    Attributes:
        decodes: sequences with one token and their ``drafts``, drawing at each of these.
        chunks: the others.
        copies: (source, destination) blocks to copy before the step; destinations are distinct.
        forks: sequences split off by this step, those that have to wait included.
        failed: sequences that can never go on, with the reason; they hold no blocks any more.
        num_preempted: sequences that lost their blocks.
        num_tokens: tokens of the step.
    """

    decodes: list[Sequence] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    forks: list[Sequence] = field(default_factory=list)
    failed: list[tuple[Sequence, str]] = field(default_factory=list)
    num_preempted: int = 0
    num_tokens: int = 0

    @property
    def items(self) -> list[tuple[Sequence, int]]:
        """(sequence, tokens) of the step, in order."""
        decodes = [(sequence, 1 + len(sequence.drafts)) for sequence in self.decodes]
        return decodes + [(chunk.sequence, chunk.num_tokens) for chunk in self.chunks]

    def sequences(self) -> Iterator[Sequence]:
        """Every sequence that the step concerns, forks included."""
        yield from self.decodes
        for chunk in self.chunks:
            yield chunk.sequence
            yield from chunk.draws[1:]


class Scheduler:
    """Owns the pool and the two queues.

    The cost of a step grows with the running sequences, never with the waiting ones: the queue is
    a heap by age, and an aborted entry stays in it as a tombstone until it surfaces or tombstones
    are the majority.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        enable_prefix_caching: bool = True,
        policy: Policy = "fcfs",
        prefix_key: bytes | None = None,
        depth: int = 1,
    ) -> None:
        self.spec = spec
        self.policy = policy
        self.depth = depth
        self.pool = BlockPool(
            spec.num_blocks, spec.block_size, enable_caching=enable_prefix_caching, key=prefix_key
        )
        self.running: list[Sequence] = []
        self.num_waiting = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._waiting: list[tuple[tuple[int, int, int], Sequence]] = []
        self._slots = list(range(spec.max_num_seqs - 1, -1, -1))

    # --- queues

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises InvalidRequest for a priority that would be ignored."""
        if self.policy == "fcfs" and sequence.request.priority:
            raise InvalidRequest(
                f"priority={sequence.request.priority} would be ignored: the engine was not"
                " started with --scheduling-policy priority",
                "priority",
            )
        self._push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Finish a sequence in whatever state; its blocks are free when this returns."""
        if sequence.status is Status.RUNNING:
            self._release(sequence)
        elif sequence.status is Status.WAITING:
            self.num_waiting -= 1
        sequence.status = Status.FINISHED
        if len(self._waiting) > 2 * self.num_waiting + 64:
            self._waiting = [entry for entry in self._waiting if entry[1].status is Status.WAITING]
            heapq.heapify(self._waiting)

    def _push(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        heapq.heappush(self._waiting, (sequence.age, sequence))
        self.num_waiting += 1

    def _peek(self) -> Sequence | None:
        while self._waiting:
            sequence = self._waiting[0][1]
            if sequence.status is Status.WAITING:
                return sequence
            heapq.heappop(self._waiting)
        return None

    def _release(self, sequence: Sequence) -> None:
        """Take a running sequence out: slot and blocks go back."""
        self.running.remove(sequence)
        self.pool.free(sequence.blocks)
        self._slots.append(sequence.slot)
        sequence.slot = NO_SLOT
        sequence.blocks = []
        sequence.drafts = []
        sequence.num_tabled = 0
        sequence.num_computed = 0

    def _enter(self, sequence: Sequence) -> None:
        """Make a sequence run; it has its blocks already."""
        sequence.slot = self._slots.pop()
        sequence.status = Status.RUNNING
        if not sequence.scheduled:
            sequence.scheduled = time.monotonic()
        self.running.append(sequence)

    # --- planning

    def schedule(self) -> Plan:
        """Plan the next step. The plan is empty only if nothing is left that could run."""
        plan = Plan()
        scores = self.spec.max_score_rows
        waiting_chunks = self._plan_decodes(plan)
        for sequence in waiting_chunks:
            if plan.num_tokens >= self.spec.max_num_batched_tokens:
                break
            if sequence.status is Status.RUNNING:  # not preempted meanwhile
                scores -= self._plan_chunk(plan, sequence, scores)
        self._admit(plan, scores)
        for chunk in plan.chunks:
            self._plan_draws(plan, chunk)
        return plan

    def _plan_decodes(self, plan: Plan) -> list[Sequence]:
        """Give one token, and drafts, to each that needs just one; gives back the others."""
        others = []
        spare = drafted = 0
        if self.spec.max_drafts:
            spare = self.draft_budget
        budget = self.spec.max_num_batched_tokens
        if self.depth > 1:
            budget = min(budget, -(-len(self.running) // self.depth))
        block_size = self.spec.block_size
        refs = self.pool.refs
        for sequence in self.running[:]:
            if sequence.flying:
                continue
            computed = sequence.num_computed
            if len(sequence.token_ids) != computed + 1 or sequence.num_forks:
                if self._reserve_tail(plan, sequence):
                    others.append(sequence)
                continue
            if sequence.status is not Status.RUNNING or len(plan.decodes) >= budget:
                continue
            block = computed // block_size
            held = block < len(sequence.blocks) and refs[sequence.blocks[block]] == 1
            if held or self._reserve(plan, sequence, block):
                if sequence.drafts:
                    drafted += self._grant_drafts(sequence, spare - drafted)
                plan.decodes.append(sequence)
        plan.num_tokens = len(plan.decodes)
        if drafted:
            plan.num_tokens += sum(len(sequence.drafts) for sequence in plan.decodes)
        return others

    @property
    def draft_budget(self) -> int:
        """Most drafted tokens that the next step takes: each running sequence goes first, and
        half of what is left is kept for prompts."""
        left = self.spec.max_num_batched_tokens - len(self.running)
        return min(max(left // 2, 0), self.spec.max_draft_rows)

    def _grant_drafts(self, sequence: Sequence, most: int) -> int:
        """Cut the drafts of a sequence to ``most`` and to the blocks that nobody needs.

        Gives how many are left. A draft costs nobody a block: one for each running sequence is
        not touched.
        """
        size = self.spec.block_size
        room = len(sequence.blocks) * size - sequence.num_computed - 1
        count = min(len(sequence.drafts), most)
        if count > room:
            free = max(self.pool.num_available - len(self.running), 0)
            blocks = min(-(-(count - room) // size), free)
            sequence.blocks += self.pool.allocate(blocks)
            count = min(count, room + blocks * size)
        del sequence.drafts[count:]
        return count

    def trim(self, sequence: Sequence) -> None:
        """Give back the blocks behind the last token in the cache: its drafts were rejected."""
        needed = -(-sequence.num_computed // self.spec.block_size)
        if needed < len(sequence.blocks):
            self.pool.free(sequence.blocks[needed:])
            del sequence.blocks[needed:]
            sequence.num_tabled = min(sequence.num_tabled, needed)

    def _reserve_tail(self, plan: Plan, sequence: Sequence) -> bool:
        """Give a sequence that got several tokens at once (a draft model's) their blocks.

        False: as with `_reserve`, or it is not running any more.
        """
        needed = -(-len(sequence.token_ids) // self.spec.block_size)
        while sequence.status is Status.RUNNING and len(sequence.blocks) < needed:
            if not self._reserve(plan, sequence, len(sequence.blocks)):
                return False
        return sequence.status is Status.RUNNING

    def _reserve(self, plan: Plan, sequence: Sequence, block: int) -> bool:
        """Give a sequence the block that a token of it is written to, all its own.

        False: it lost its blocks (it is the youngest), it can never go on, or it has to wait for
        steps that were launched.
        """
        while self.pool.num_available == 0:
            if self._is_own(sequence, block):  # the other holder of the block was preempted
                return True
            if len(self.running) == 1:
                self._fail(plan, sequence, len(sequence.token_ids))
                return False
            victim = max((s for s in self.running if not s.flying), key=_age)
            if victim is sequence and any(s.flying for s in self.running):
                return False
            self._preempt(plan, victim)
            if victim is sequence:
                return False
        if self._is_own(sequence, block):
            return True
        (fresh,) = self.pool.allocate(1)
        if block == len(sequence.blocks):
            sequence.blocks.append(fresh)
        else:  # copy on write
            shared = sequence.blocks[block]
            plan.copies.append((shared, fresh))
            self.pool.free([shared])
            sequence.blocks[block] = fresh
            sequence.num_tabled = min(sequence.num_tabled, block)
        return True

    def _is_own(self, sequence: Sequence, block: int) -> bool:
        held = block < len(sequence.blocks)
        return held and self.pool.refs[sequence.blocks[block]] == 1

    def _preempt(self, plan: Plan, victim: Sequence) -> None:
        """Take the blocks of a running sequence, and its place in the step if it has one."""
        if victim in plan.decodes:
            plan.decodes.remove(victim)
            fresh = set(victim.blocks)
            plan.copies = [copy for copy in plan.copies if copy[1] not in fresh]
        self._release(victim)
        victim.num_preemptions += 1
        plan.num_preempted += 1
        self._push(victim)

    def _fail(self, plan: Plan, sequence: Sequence, num_tokens: int) -> None:
        pool = self.pool
        message = (
            f"the KV cache holds {pool.num_usable * pool.block_size} tokens"
            f" and this sequence alone needs {num_tokens}: shorten the prompt or max_tokens,"
            " or give the cache more memory"
        )
        plan.failed.append((sequence, message))
        self.remove(sequence)

    def _plan_chunk(self, plan: Plan, sequence: Sequence, scores: int) -> int:
        """Give a running sequence what the budget allows; gives the score rows it used."""
        start = sequence.num_computed
        count = min(sequence.num_pending, self.spec.max_num_batched_tokens - plan.num_tokens)
        if count <= 0:  # a fork whose first token is not drawn yet, or no budget
            return 0
        chunk = Chunk(sequence, count, start)
        if sequence.num_scored < sequence.num_prompt:
            # the row at position p scores token p + 1
            chunk.score_start = sequence.num_scored - 1
            chunk.num_tokens = min(count, chunk.score_start + scores - start)
            end = min(start + chunk.num_tokens, sequence.num_prompt - 1)
            chunk.num_scores = max(end - chunk.score_start, 0)
            if chunk.num_tokens <= 0:
                return 0
        plan.chunks.append(chunk)
        plan.num_tokens += chunk.num_tokens
        return chunk.num_scores

    def _plan_draws(self, plan: Plan, chunk: Chunk) -> None:
        """Split the forks off a prompt that this step completes.

        Forks share all its blocks, the last partial one included, until they write to it. Those
        that find no slot wait as sequences of their own, for which the prompt is most likely in
        the prefix cache.
        """
        parent = chunk.sequence
        if chunk.start + chunk.num_tokens < len(parent.token_ids):
            return
        chunk.draws.append(parent)
        while parent.num_forks:
            child = parent.fork(self.spec.max_model_len)
            plan.forks.append(child)
            if not self._slots:
                self._push(child)
                continue
            child.blocks = parent.blocks[:]
            child.num_computed = child.num_prompt
            self.pool.share(child.blocks)
            self._enter(child)
            chunk.draws.append(child)

    # --- admission

    def _admit(self, plan: Plan, scores: int) -> None:
        while self._slots and plan.num_tokens < self.spec.max_num_batched_tokens:
            sequence = self._peek()
            if sequence is None or (sequence.num_scored < sequence.num_prompt and scores <= 0):
                return
            needed = -(-len(sequence.token_ids) // self.spec.block_size)
            if needed > self.pool.num_usable:
                self._fail(plan, sequence, len(sequence.token_ids))
                continue
            if not self._give_blocks(sequence, needed):
                return
            heapq.heappop(self._waiting)
            self.num_waiting -= 1
            self._enter(sequence)
            scores -= self._plan_chunk(plan, sequence, scores)

    def _give_blocks(self, sequence: Sequence, needed: int) -> bool:
        """Take ``needed`` blocks, those of a cached prefix first; False: not enough now.

        One block a running sequence is left for their decoding, so that admitting one does not
        preempt it again at once.
        """
        found = self._match(sequence)
        refs = self.pool.refs
        revived = sum(refs[block] == 0 for block in found)
        spare = len(self.running)
        if needed - len(found) + revived + spare > self.pool.num_available:
            return False
        self.pool.share(found)
        sequence.blocks = found + self.pool.allocate(needed - len(found))
        sequence.num_computed = len(found) * self.spec.block_size
        if sequence.num_cached < 0:
            sequence.num_cached = sequence.num_computed
            self.prefix_queries += sequence.num_prompt
            self.prefix_hits += sequence.num_computed
        return True

    def _match(self, sequence: Sequence) -> list[int]:
        """Blocks of the longest cached prefix; at least one token is left to run.

        Prompt tokens that still need their log-probability or their taps are not skipped.
        """
        found: list[int] = []
        told = sequence.num_scored >= sequence.num_prompt and (
            not sequence.params.taps or sequence.num_tapped >= sequence.num_prompt - 1
        )
        if not self.pool.enable_caching or not told:
            return found
        for number in range((len(sequence.token_ids) - 1) // self.spec.block_size):
            block = self.pool.find(self._digest(sequence, number))
            if block is None:
                break
            found.append(block)
        return found

    # --- prefix cache

    def commit_blocks(self, sequence: Sequence, start: int, end: int) -> None:
        """Index the blocks filled by the tokens from ``start`` to ``end``."""
        if self.pool.enable_caching:
            block_size = self.spec.block_size
            for number in range(start // block_size, end // block_size):
                self.pool.commit(sequence.blocks[number], self._digest(sequence, number))

    def _digest(self, sequence: Sequence, number: int) -> bytes:
        digests, size = sequence.digests, self.spec.block_size
        while len(digests) <= number:
            parent = digests[-1] if digests else self.pool.root(sequence.request.cache_salt)
            begin = len(digests) * size
            digests.append(self.pool.digest(parent, sequence.token_ids[begin : begin + size]))
        return digests[number]

    def check(self) -> None:
        """Assert that every block, slot and queue entry is accounted for."""
        self.pool.check(sequence.blocks for sequence in self.running)
        slots = [sequence.slot for sequence in self.running]
        assert sorted(slots + self._slots) == list(range(self.spec.max_num_seqs))
        waiting = [s for _, s in self._waiting if s.status is Status.WAITING]
        assert len(waiting) == len(set(waiting)) == self.num_waiting
        assert not any(sequence.blocks for sequence in waiting)
        for sequence in self.running:
            assert sequence.status is Status.RUNNING, sequence.status
            assert sequence.num_computed <= len(sequence.blocks) * self.spec.block_size


def _age(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.age
