"""From the engine's token ids to what a user reads: text, stop strings, log-probabilities.

Here: `OutputProcessor`, used by the offline `LLM` and by the server alike, and the result
classes with vLLM's names. Not here: HTTP, sockets, and decoding itself (``detokenize``).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from fxlm.runtime.detokenize import Detokenizer, StopStrings, Tokenizer
from fxlm.runtime.messages import FinishReason, Output, Tapped, TokenLogprob
from fxlm.runtime.request import Request

OutputKind = Literal["cumulative", "delta", "final"]


@dataclass(slots=True)
class Logprob:
    """Log-probability of one token at one position.

    Args:
        rank: 1 is the most likely token.
        decoded_token: the token alone as text.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]  # of one position; the drawn (or prompt's) token comes first


@dataclass(slots=True)
class CompletionOutput:
    """One completion, whole or (kind "delta") what is new of it.

    Args:
        cumulative_logprob: sum over the tokens drawn so far; None unless logprobs were asked for.
        logprobs: a dict per token of ``token_ids``.
        finish_reason: None while it goes on.
        stop_reason: the stop string or token id that ended it.
        message: what went wrong, when ``finish_reason`` is "error".
        taps: float32 [rows, ...] of each point asked for: a row a token of ``token_ids``, and
            with ``tap_prompt`` those of the prompt before them.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    message: str = ""
    taps: dict[str, npt.NDArray[np.float32]] | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A request and its completions.

    Args:
        prompt: text of the prompt, None if it came as token ids.
        prompt_logprobs: per prompt token; None for the first. Whole list None unless asked for.
        outputs: completions in order of index; for "delta", those with news.
        finished: whether all completions are.
        num_cached_tokens: prompt tokens found in the prefix cache.
        num_preemptions: of all completions together.
        scheduled: ``time.monotonic()`` when it was first run (0: not yet).
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    scheduled: float = 0.0


@dataclass(slots=True)
class Processed:
    """What one call of `OutputProcessor.process` brought.

    Args:
        outputs: requests with news.
        aborts: (request id, index) that the engine is to abort: a stop string ended them.
    """

    outputs: list[RequestOutput] = field(default_factory=list)
    aborts: list[tuple[str, int]] = field(default_factory=list)


class OutputProcessor:
    """Turns engine outputs into request outputs.

    Args:
        tokenizer: decodes; may be None if every request has ``detokenize=False``.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._requests: dict[str, _Request] = {}

    def add_request(
        self, request: Request, prompt: str | None = None, kind: OutputKind = "cumulative"
    ) -> None:
        """Expect outputs of a request.

        Args:
            request: as given to the engine.
            prompt: its text, to be handed back.
            kind: "cumulative" gives everything so far each time, "delta" what is new, "final"
                one output at the end.
        """
        assert request.request_id not in self._requests, request.request_id
        self._requests[request.request_id] = _Request(self.tokenizer, request, prompt, kind)

    def remove_request(self, request_id: str) -> None:
        """Forget a request (its client left); later outputs of it are ignored."""
        self._requests.pop(request_id, None)

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def process(self, outputs: Iterable[Output]) -> Processed:
        """Take a batch of engine outputs; those of unknown or ended completions are ignored."""
        processed = Processed()
        touched: dict[str, _Request] = {}
        for output in outputs:
            request = self._requests.get(output.request_id)
            if request is None:
                continue
            touched[output.request_id] = request
            if request.take(output):
                processed.aborts.append((output.request_id, output.index))
        for request_id, request in touched.items():
            news = request.give()
            if news is not None:
                processed.outputs.append(news)
            if request.finished:
                del self._requests[request_id]
        return processed


class _Request:
    """One request while it is running."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        request: Request,
        prompt: str | None,
        kind: OutputKind,
    ) -> None:
        self._kind = kind
        self._tokenizer = tokenizer
        self._completions = [_Completion(tokenizer, request, i) for i in range(request.params.n)]
        self._result = RequestOutput(request.request_id, prompt, request.prompt_token_ids)
        self._preemptions = [0] * request.params.n
        self._news: dict[int, None] = {}  # indices, in order of arrival

    @property
    def finished(self) -> bool:
        return all(completion.finish_reason for completion in self._completions)

    def take(self, output: Output) -> bool:
        """Add an engine output; True if a stop string ended the completion."""
        completion = self._completions[output.index]
        if completion.finish_reason:
            return False
        self._news[output.index] = None
        result = self._result
        result.num_cached_tokens = max(result.num_cached_tokens, output.num_cached_tokens)
        self._preemptions[output.index] += output.num_preemptions
        result.num_preemptions = sum(self._preemptions)
        result.scheduled = result.scheduled or output.scheduled
        if output.prompt_logprobs is not None:
            named = [name_logprobs(self._tokenizer, found) for found in output.prompt_logprobs]
            result.prompt_logprobs = [None, *named]
        return completion.take(output)

    def give(self) -> RequestOutput | None:
        """What the client is to see now; None if nothing."""
        finished = self.finished
        indices = sorted(self._news) if self._kind == "delta" else range(len(self._completions))
        self._news = {}
        if self._kind == "final" and not finished:
            return None
        delta = self._kind == "delta"
        result = self._result
        outputs = [self._completions[i].give(delta) for i in indices]
        shown = RequestOutput(
            request_id=result.request_id,
            prompt=result.prompt,
            prompt_token_ids=result.prompt_token_ids,
            prompt_logprobs=result.prompt_logprobs,
            outputs=outputs,
            finished=finished,
            num_cached_tokens=result.num_cached_tokens,
            num_preemptions=result.num_preemptions,
            scheduled=result.scheduled,
        )
        if delta:
            result.prompt_logprobs = None  # told once
        return shown


class _Completion:
    """Text and books of one completion."""

    def __init__(self, tokenizer: Tokenizer | None, request: Request, index: int) -> None:
        params = request.params
        self.index = index
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.message = ""
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.cumulative_logprob = 0.0
        self._params = params
        self._tokenizer = tokenizer
        self._stops = StopStrings(params.stop_strings)
        self._detokenizer: Detokenizer | None = None
        if params.detokenize:
            assert tokenizer is not None, "text needs a tokenizer"
            self._detokenizer = Detokenizer(
                tokenizer,
                request.prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
            )
        self._taps: dict[str, list[npt.NDArray[np.float32]]] = {}
        self._num_text_given = 0
        self._num_tokens_given = 0

    def take(self, output: Output) -> bool:
        """Add an engine output; True if a stop string ended it (the engine does not know)."""
        for name, tapped in (output.taps or {}).items():
            self._taps.setdefault(name, []).append(rows_of(tapped))
        for number, token in enumerate(output.token_ids):
            last = number == len(output.token_ids) - 1
            self.token_ids.append(token)
            if output.logprobs is not None:
                self._take_logprobs(output.logprobs[number])
            ends = output.finish_reason == "stop" and last
            silent = ends and not self._params.include_stop_str_in_output
            if not silent and self._take_text(token):
                return output.finish_reason is None
        if output.finish_reason is not None:
            self._end(output)
        return False

    def _end(self, output: Output) -> None:
        """The engine ended it; a stop string in the rest of the text only names another reason."""
        self.stop_reason = output.stop_reason
        self.message = output.message
        self.finish_reason = output.finish_reason
        if self._detokenizer is not None:
            self._search(self._detokenizer.flush())

    def _take_text(self, token: int) -> bool:
        return self._detokenizer is not None and self._search(self._detokenizer.push([token]))

    def _search(self, new: str) -> bool:
        """Add text; True if it completes a stop string, which then ends the text."""
        self.text += new
        if not new or not self._stops.stops or len(self.token_ids) <= self._params.min_tokens:
            return False
        found = self._stops.find(self.text, len(new))
        if found is None:
            return False
        place, stop = found
        keep = place + len(stop) if self._params.include_stop_str_in_output else place
        self.text = self.text[:keep]
        self.finish_reason, self.stop_reason = "stop", stop
        return True

    def _take_logprobs(self, found: Sequence[TokenLogprob]) -> None:
        self.cumulative_logprob += found[0][1]
        if self.logprobs is not None:
            self.logprobs.append(name_logprobs(self._tokenizer, found))

    def give(self, delta: bool) -> CompletionOutput:
        """The completion so far, or what is new; text that may become a stop string is kept."""
        end = len(self.text)
        if self.finish_reason is None:
            end -= self._stops.num_held(self.text)
        text_from, token_from = (self._num_text_given, self._num_tokens_given) if delta else (0, 0)
        if delta:
            self._num_text_given, self._num_tokens_given = end, len(self.token_ids)
        taps = {name: np.concatenate(rows) for name, rows in self._taps.items()}
        if delta:
            self._taps = {}
        return CompletionOutput(
            index=self.index,
            text=self.text[text_from:end],
            token_ids=self.token_ids[token_from:],
            cumulative_logprob=None if self.logprobs is None else self.cumulative_logprob,
            logprobs=None if self.logprobs is None else self.logprobs[token_from:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            message=self.message,
            taps=taps or None,
        )


def rows_of(tapped: Tapped) -> npt.NDArray[np.float32]:
    """The array of a message."""
    return np.frombuffer(tapped.data, np.dtype("<f4")).reshape(tapped.shape)


def name_logprobs(tokenizer: Tokenizer | None, found: Sequence[TokenLogprob]) -> TokenLogprobs:
    """One position's log-probabilities as vLLM's dict; a token listed twice keeps its rank."""
    named: TokenLogprobs = {}
    for token, value, rank in found:
        if token not in named:
            text = None if tokenizer is None else tokenizer.decode([token], False)
            named[token] = Logprob(value, rank, text)
    return named
