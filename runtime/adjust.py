"""Penalties, biases and the ban on early stops of one sequence, as the sparse lists of a step.

Here: `Adjust`, kept up to date token by token, forth and back. Not here: what the ``sample`` op
makes of it.

One entry a token id: ``count`` is its occurrences in the output (0: in the prompt only, -1: in
neither), ``bias`` is added to its logit.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from fxlm.runtime.request import Request
from fxlm.runtime.sampling_params import MAX_BIAS, SamplingParams

BIAS_ONLY = -1


def adjusts(params: SamplingParams) -> bool:
    """Whether a sequence with these options needs an `Adjust`."""
    return params.has_penalties or bool(params.logit_bias) or params.min_tokens > 0


class Adjust:
    """Entries of one sequence.

    Attributes:
        size: entries in use of ``ids`` (int64), ``counts`` (int32) and ``bias`` (float32).
        num_seen: tokens of prompt and output that are counted.
    """

    def __init__(self, request: Request, vocab_size: int) -> None:
        params = request.params
        self.size = 0
        self.ids: npt.NDArray[np.int64] = np.zeros(16, np.int64)
        self.counts: npt.NDArray[np.int32] = np.zeros(16, np.int32)
        self.bias: npt.NDArray[np.float32] = np.zeros(16, np.float32)
        self._places: dict[int, int] = {}
        self._stops: list[int] = []  # places of the tokens that are banned at first
        self._unbanned: npt.NDArray[np.float32] = self.bias[:0]  # their biases otherwise
        self._counts_output = params.has_penalties
        self.num_seen = len(request.prompt_token_ids)
        self._first_stop = self.num_seen + params.min_tokens
        penalized = request.prompt_token_ids if params.repetition_penalty != 1.0 else ()
        self._prompt = dict.fromkeys(penalized)
        self._add(self._prompt, 0)
        self._add_bias(params.logit_bias or {})
        stops = {*request.eos_token_ids, *(params.stop_token_ids or ())}
        known = sorted(token for token in stops if 0 <= token < vocab_size)
        self._ban(known if params.min_tokens else [])

    def extend(self, tokens: Iterable[int]) -> int:
        """Count the next tokens of the output; gives the number of entries that count now."""
        for token in tokens:
            self.num_seen += 1
            if self._counts_output:
                place = self._place(token)
                self.counts[place] = max(int(self.counts[place]), 0) + 1
        return self._settle()

    def rewind(self, tokens: Iterable[int]) -> int:
        """Take back the last tokens, in any order; gives the number of entries that count now."""
        for token in tokens:
            self.num_seen -= 1
            if self._counts_output:
                place = self._places[token]
                left = int(self.counts[place]) - 1
                self.counts[place] = left or (0 if token in self._prompt else BIAS_ONLY)
        return self._settle()

    def _settle(self) -> int:
        """Ban the stop tokens for as long as they are; gives the number of entries that count."""
        banned = self._stops and self.num_seen < self._first_stop
        if self._stops:
            self.bias[self._stops] = -np.inf if banned else self._unbanned
        return self.size if self._counts_output or banned or self._has_bias else 0

    def _add_bias(self, biases: dict[int, float]) -> None:
        self._has_bias = bool(biases)
        for token, bias in biases.items():
            place = self._place(token)  # first: it may grow the arrays, which moves them
            self.bias[place] = min(max(bias, -MAX_BIAS), MAX_BIAS)

    def _ban(self, tokens: list[int]) -> None:
        self._stops = [self._place(token) for token in tokens]
        self._unbanned = self.bias[self._stops].copy()
        self.bias[self._stops] = -np.inf

    def _add(self, tokens: Iterable[int], count: int) -> None:
        for token in tokens:
            place = self._place(token)  # first: it may grow the arrays, which moves them
            self.counts[place] = count

    def _place(self, token: int) -> int:
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = self.size
            if place == len(self.ids):
                self._grow()
            self.ids[place] = token
            self.counts[place] = BIAS_ONLY
            self.bias[place] = 0.0
            self.size += 1
        return place

    def _grow(self) -> None:
        more = len(self.ids)
        self.ids = np.concatenate([self.ids, np.zeros(more, np.int64)])
        self.counts = np.concatenate([self.counts, np.zeros(more, np.int32)])
        self.bias = np.concatenate([self.bias, np.zeros(more, np.float32)])
