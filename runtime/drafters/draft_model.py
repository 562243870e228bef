"""A smaller model that drafts: compiled and run like the target, with a cache of its own.

Here: `ModelDrafter`. Not here: its worker and memory (`worker`, `memory`), verification.

For each sequence of the target there is a shadow, a sequence of the draft's own scheduler with
the same options and seed. Before drafting, a shadow takes over what the target has accepted: its
own guesses that were right are in its cache already, what comes after them is overwritten. Then
the draft runs steps of its own, one for each token to guess; long prompts go in chunks, over
several calls if need be. It draws with the target's noise, since the noise of a token hangs on
seed, position and token alone, and so often draws the target's token at any temperature.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from fxlm.runtime.batch import Batch
from fxlm.runtime.drafters.base import Drafter
from fxlm.runtime.request import Request
from fxlm.runtime.scheduler import Plan, Scheduler
from fxlm.runtime.sequence import Sequence, Status
from fxlm.runtime.step import Worker


@dataclass(slots=True)
class _Shadow:
    """The draft's copy of a sequence.

    Attributes:
        sequence: between calls it holds just the tokens that are in the draft's cache.
        known: leading tokens taken over from the target.
        indexed: leading tokens whose blocks are in the draft's prefix cache.
        limit: tokens still to guess in this call.
        guess: tokens guessed in this call.
    """

    sequence: Sequence
    known: int = 0
    indexed: int = 0
    limit: int = 0
    guess: list[int] | None = None

    @property
    def is_fresh(self) -> bool:
        """Whether its prompt is still to be run."""
        return self.sequence.num_computed < self.sequence.num_prompt - 1


class ModelDrafter(Drafter):
    """Drafts with a model.

    Args:
        worker: of the draft model; its tokens are the target's.
        enable_prefix_caching: reuse the blocks of equal prefixes.
    """

    def __init__(self, worker: Worker, *, enable_prefix_caching: bool = True) -> None:
        self.worker = worker
        self.spec = worker.spec
        self.scheduler = Scheduler(self.spec, enable_prefix_caching=enable_prefix_caching)
        self.batch = Batch(self.spec)
        self._shadows: dict[Sequence, _Shadow] = {}

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[list[int]]:
        """See `Drafter.propose`. One step of the draft a token; none while a prompt is long."""
        self._forget_waiting()
        asked: dict[Sequence, _Shadow] = {}
        guesses: list[list[int]] = []
        fresh = {shadow.sequence.order for shadow in self._shadows.values() if shadow.is_fresh}
        for sequence, limit in zip(sequences, limits, strict=True):
            room = self.spec.max_model_len - len(sequence.token_ids)
            guesses.append([])
            if room <= 0:  # the context of the draft is shorter
                self.finish(sequence)
                continue
            if sequence not in self._shadows and sequence.order in fresh:
                continue  # the first of several completions runs the prompt; the others find it
            shadow = self._follow(sequence)
            if shadow.is_fresh:
                fresh.add(sequence.order)
            shadow.limit = min(limit, room)
            shadow.guess = guesses[-1]
            asked[shadow.sequence] = shadow
        left = max(limits)
        while left > 0:
            plan = self.scheduler.schedule()
            if not plan.num_tokens:
                break
            left -= self._run(plan, asked, left)
        for shadow in asked.values():
            self._settle(shadow)
        return guesses

    def finish(self, sequence: Sequence) -> None:
        """Free the cache of a sequence."""
        shadow = self._shadows.pop(sequence, None)
        if shadow is not None and shadow.sequence.status is not Status.FINISHED:
            self.scheduler.remove(shadow.sequence)

    def _forget_waiting(self) -> None:
        """Sequences that the target preempted leave their place; the prefix cache keeps it."""
        for sequence, shadow in list(self._shadows.items()):
            gone = shadow.sequence.status is Status.FINISHED  # it did not fit the draft's cache
            if gone or sequence.status is not Status.RUNNING:
                self.finish(sequence)

    # --- following the target

    def _follow(self, sequence: Sequence) -> _Shadow:
        """The shadow of a sequence, brought to the target's tokens."""
        shadow = self._shadows.get(sequence)
        if shadow is None:
            shadow = self._shadows[sequence] = _Shadow(self._copy(sequence))
            self.scheduler.add(shadow.sequence)
        self._take_over(shadow, sequence.token_ids)
        return shadow

    def _copy(self, sequence: Sequence) -> Sequence:
        params = msgspec.structs.replace(
            sequence.params, n=1, logprobs=None, prompt_logprobs=None, max_tokens=None
        )
        request = Request(
            request_id=sequence.request.request_id,
            prompt_token_ids=sequence.request.prompt_token_ids,
            params=params,
            eos_token_ids=sequence.request.eos_token_ids,
            cache_salt=sequence.request.cache_salt,
        )
        return Sequence(
            request,
            order=sequence.order,
            seed=sequence.seed,
            max_model_len=self.spec.max_model_len,
            index=sequence.index,
        )

    def _take_over(self, shadow: _Shadow, token_ids: list[int]) -> None:
        """Keep the guesses that were right, drop the others, add what is new."""
        own = shadow.sequence
        right, most = shadow.known, min(len(own.token_ids), len(token_ids) - 1)
        while right < most and own.token_ids[right] == token_ids[right]:
            right += 1
        self._cut(own, right)
        own.token_ids += token_ids[right:]
        own.num_computed = min(own.num_computed, right, len(token_ids) - 1)
        shadow.known = len(token_ids)
        self.scheduler.trim(own)

    def _settle(self, shadow: _Shadow) -> None:
        """After guessing: drop a token that was not run, index what the target accepted."""
        own = shadow.sequence
        self._cut(own, max(own.num_computed, shadow.known))
        end = min(own.num_computed, shadow.known)
        self.scheduler.commit_blocks(own, min(shadow.indexed, end), end)  # less: it was preempted
        shadow.indexed = end

    def _cut(self, own: Sequence, kept: int) -> None:
        """Drop the tokens behind the first ``kept``, and what was made of them."""
        if own.adjust is not None:
            own.adjust.rewind(own.token_ids[kept : own.adjust.num_seen])
        del own.token_ids[kept:]
        del own.digests[kept // self.spec.block_size :]

    # --- guessing

    def _run(self, plan: Plan, asked: dict[Sequence, _Shadow], left: int) -> int:
        """Steps of the draft; shadows that drew and want more get the token to run next.

        One step, or as many of ``left`` as follow from one another; gives their number.
        """
        rounds = self._num_rounds(plan, asked, left)
        self.batch.fill(plan, ahead=rounds - 1)
        if plan.copies:
            self.worker.copy_blocks(plan.copies)
        drawn = list(plan.decodes)
        for chunk in plan.chunks:
            drawn += chunk.draws
        items = plan.items
        for count in range(rounds):
            token_ids = self.worker.launch(self.batch).result().token_ids
            for sequence, tokens in items:
                sequence.num_computed += tokens
            for sequence, token in zip(drawn, token_ids, strict=False):  # an idle row is nobody's
                if sequence in asked:  # otherwise only its prompt was still to be run
                    _guess(asked[sequence], token)
            if count + 1 < rounds:
                self.batch.advance(token_ids)
        return rounds

    def _num_rounds(self, plan: Plan, asked: dict[Sequence, _Shadow], left: int) -> int:
        """Steps that differ in positions and tokens alone: all decode, as far as the first to end.

        Blocks are taken for all of them; too few are no reason to preempt anyone.
        """
        decodes, size = plan.decodes, self.spec.block_size
        if plan.chunks or self.scheduler.num_waiting:
            return 1
        shadows = [asked.get(sequence) for sequence in decodes]
        if not all(shadow and not shadow.sequence.has_adjust for shadow in shadows):
            return 1
        rounds = min(left, *(s.limit - len(s.guess or ()) for s in shadows if s))
        needed = [-(-(s.num_computed + rounds) // size) - len(s.blocks) for s in decodes]
        if sum(max(count, 0) for count in needed) > self.scheduler.pool.num_available:
            return 1
        for sequence, count in zip(decodes, needed, strict=True):
            if count > 0:
                sequence.blocks += self.scheduler.pool.allocate(count)
        return rounds


def _guess(shadow: _Shadow, token: int) -> None:
    assert shadow.guess is not None, shadow.sequence.order
    shadow.guess.append(token)
    if len(shadow.guess) < shadow.limit:
        shadow.sequence.token_ids.append(token)
