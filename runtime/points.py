"""Taps and steering: hidden states out of a request, vectors into it.

Here: what a request may ask at which point, the tensors of steering for a step, and the rows of
taps that belong to a sequence. Not here: the graph code (`fxlm.passes.tap`, `fxlm.passes.steer`).

A tapped sequence gets, with each token, the row of the position that the token was drawn from; with
``tap_prompt`` the rows of the positions before come first. A steered one adds its vectors to
every position of it, prompt included, so its keys and values are its own: its prefixes are
shared only with requests that steer alike.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from fxlm.compiler.errors import InvalidRequest
from fxlm.compiler.nearest import hint
from fxlm.runtime.messages import Output, Tapped
from fxlm.runtime.request import Request
from fxlm.runtime.sampling_params import SamplingParams
from fxlm.runtime.scheduler import Plan
from fxlm.runtime.sequence import Sequence
from fxlm.runtime.step import StepResult, WorkerSpec

MAX_TAP_BYTES = 64 << 20  # of all taps of a request, over HTTP of all its prompts
MAX_STEER = 1e6  # absolute value of a component


class Points:
    """The points of one engine.

    Args:
        spec: says which there are, and their sizes.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self._owners: list[Sequence | None] = [None] * (spec.max_num_seqs + 1)
        if spec.steered:
            width = sum(spec.steered.values())
            self._table = torch.zeros(spec.max_num_seqs + 1, width)
            self._rows = torch.zeros(spec.max_num_batched_tokens, dtype=torch.int64)

    # --- requests

    def admit(self, request: Request) -> Request:
        """The request as the engine takes it: checked, its prefixes kept apart if it steers.

        Raises:
            InvalidRequest: a point that is unknown or named twice, a vector of another size, or
                more than may be tapped.
        """
        params = request.params
        if params.taps:
            self._verify_taps(params, len(request.prompt_token_ids), request.num_together)
        if not params.steer:
            return request
        self._verify_steer(params)
        digest = hashlib.sha256(repr(sorted(params.steer.items())).encode()).hexdigest()
        salt = f"{len(request.cache_salt)}:{request.cache_salt}steer:{digest}"
        return msgspec.structs.replace(request, cache_salt=salt)

    def _verify_taps(self, params: SamplingParams, num_prompt: int, num_together: int) -> None:
        taps = params.taps or []
        for place, name in enumerate(taps):
            _known("taps", name, self.spec.taps, "--tap")
            if name in taps[:place]:
                raise InvalidRequest(f"taps name {name!r} twice: name each point once", "taps")
        if params.n > 1:
            raise InvalidRequest("taps need n=1: completions share their prompt", "taps")
        most = self.spec.max_model_len
        if params.max_tokens is not None:
            most = min(most, params.max_tokens + (num_prompt if params.tap_prompt else 0))
        row = sum(4 * math.prod(self.spec.taps[name]) for name in taps)
        total = num_together * most * row
        if total > MAX_TAP_BYTES:
            prompts = f" of each of {num_together} prompts" if num_together > 1 else ""
            fewer = ", or give fewer prompts" if num_together > 1 else ""
            raise InvalidRequest(
                f"taps of up to {most} tokens{prompts} take {total} bytes, and {MAX_TAP_BYTES} are "
                f"allowed: lower max_tokens, or tap fewer points{fewer}",
                "taps",
            )

    def _verify_steer(self, params: SamplingParams) -> None:
        for name, vector in (params.steer or {}).items():
            _known("steer", name, self.spec.steered, "--steer")
            size = self.spec.steered[name]
            if len(vector) != size:
                message = f"steer[{name!r}] has {len(vector)} numbers, must have {size}"
                raise InvalidRequest(message, "steer")
            for place, value in enumerate(vector):
                if not -MAX_STEER <= value <= MAX_STEER:  # false for NaN too
                    message = f"steer[{name!r}][{place}]={value!r} cannot be used: "
                    message += f"numbers must be finite and in [-{MAX_STEER:g}, {MAX_STEER:g}]"
                    raise InvalidRequest(message, "steer")

    # --- steps

    def fill(self, plan: Plan) -> dict[str, torch.Tensor]:
        """Step inputs of steering; empty if the graph has none."""
        if not self.spec.steered:
            return {}
        begin = 0
        for sequence, count in plan.items:
            row = self._row(sequence) if sequence.params.steer else 0
            self._rows[begin : begin + count] = row
            begin += count
        return {"steer_table": self._table, "steer_rows": self._rows[:begin]}

    def _row(self, sequence: Sequence) -> int:
        """The row that holds the vectors of a sequence, written when it comes to its slot."""
        row = sequence.slot + 1
        if self._owners[row] is not sequence:
            self._owners[row] = sequence
            begin = 0
            for name, size in self.spec.steered.items():
                vector = (sequence.params.steer or {}).get(name)
                part = self._table[row, begin : begin + size]
                part.zero_() if vector is None else part.copy_(torch.tensor(vector))
                begin += size
        return row

    def keep(self, sequence: Sequence, result: StepResult, begin: int, count: int) -> None:
        """Keep the rows of tokens [begin, begin + count) of a step for the next output.

        Rows of positions that were told before (it was preempted since) are left out, and so is
        the prompt up to its last token, unless it is asked for.
        """
        names = sequence.params.taps
        if not names:
            return
        told = sequence.num_tapped - sequence.num_computed
        first = max(told, 0)
        if first >= count:
            return
        for name in names:
            rows = result.taps[name][begin + first : begin + count]
            sequence.tapped.setdefault(name, []).append(_float32(rows))
        sequence.num_tapped = sequence.num_computed + count

    def give(self, sequence: Sequence, output: Output) -> None:
        """Put what was kept into an output."""
        if sequence.tapped:
            output.taps = {name: _message(rows) for name, rows in sequence.tapped.items()}
            sequence.tapped = {}


def _message(rows: list[npt.NDArray[np.float32]]) -> Tapped:
    whole = np.concatenate(rows)
    return Tapped(shape=list(whole.shape), data=whole.astype("<f4").tobytes())


def _float32(rows: torch.Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = rows.to("cpu", torch.float32).numpy().copy()
    return array


def _known(field: str, name: str, points: dict[str, Any], flag: str) -> None:
    if name in points:
        return
    near = hint(name, points)
    there = ", ".join(points) or "none"
    raise InvalidRequest(
        f"{field} has no point {name!r}: {near and f'{near} '}the engine has {there} "
        f"(start it with {flag})",
        field,
    )
