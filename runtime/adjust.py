"""Penalties, biases and the ban on early stops of one sequence, as the sparse lists of a step.

Here: `Adjust`, kept up to date token by token. Not here: what the ``sample`` op makes of it.

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
    """

    def __init__(self, request: Request, vocab_size: int) -> None:
        params = request.params
        self.size = 0
        self.ids: npt.NDArray[np.int64] = np.zeros(16, np.int64)
        self.counts: npt.NDArray[np.int32] = np.zeros(16, np.int32)
        self.bias: npt.NDArray[np.float32] = np.zeros(16, np.float32)
        self._places: dict[int, int] = {}
        self._banned: list[int] = []  # places
        self._unbanned: npt.NDArray[np.float32] = self.bias[:0]  # their biases otherwise
        self._counts_output = params.has_penalties
        self._num_prompt = len(request.prompt_token_ids)
        self._num_seen = self._num_prompt
        self._first_stop = self._num_prompt + params.min_tokens
        if params.repetition_penalty != 1.0:
            self._add(dict.fromkeys(request.prompt_token_ids), 0)
        self._add_bias(params.logit_bias or {})
        stops = {*request.eos_token_ids, *(params.stop_token_ids or ())}
        known = sorted(token for token in stops if 0 <= token < vocab_size)
        self._ban(known if params.min_tokens else [])

    def update(self, token_ids: list[int]) -> int:
        """Count the tokens that are new; gives the number of entries that count now.

        Args:
            token_ids: prompt and output of the sequence; only ever longer than before.
        """
        if self._counts_output:
            for token in token_ids[self._num_seen :]:
                place = self._place(token)
                self.counts[place] = max(int(self.counts[place]), 0) + 1
        self._num_seen = len(token_ids)
        if self._banned and self._num_seen >= self._first_stop:
            self.bias[self._banned] = self._unbanned
            self._banned = []
        idle = not self._counts_output and not self._banned and not self._has_bias
        return 0 if idle else self.size

    def _add_bias(self, biases: dict[int, float]) -> None:
        self._has_bias = bool(biases)
        for token, bias in biases.items():
            place = self._place(token)  # first: it may grow the arrays, which moves them
            self.bias[place] = min(max(bias, -MAX_BIAS), MAX_BIAS)

    def _ban(self, tokens: list[int]) -> None:
        self._banned = [self._place(token) for token in tokens]
        self._unbanned = self.bias[self._banned].copy()
        self.bias[self._banned] = -np.inf

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
