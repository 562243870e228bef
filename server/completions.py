"""POST /v1/completions.

Here: prompts in their four forms, the endpoint's own fields, and its replies, whole and streamed.
Not here: fields shared with /v1/chat/completions (`params.py`), the engine (`bridge.py`).
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from fxlm.runtime.messages import Taps, TokenLogprob, joined
from fxlm.runtime.sampling_params import SamplingParams
from fxlm.server.auth import tenant_of
from fxlm.server.bridge import Delta, Generation, Job, off_loop
from fxlm.server.decode import read_request
from fxlm.server.errors import bad_request
from fxlm.server.limits import Limits
from fxlm.server.params import (
    check_prompt_length,
    common_params,
    refuse,
    salted,
    verify,
    with_length,
)
from fxlm.server.protocol import CompletionRequest, Prompt
from fxlm.server.record import record_of
from fxlm.server.replies import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    PromptLogprobs,
    Usage,
    to_json,
    usage,
)
from fxlm.server.served import ServedModel
from fxlm.server.sse import DONE, EventStream, encode_event, until_disconnect
from fxlm.server.state import ServerState, state_of
from fxlm.server.texts import TokenTexts

DEFAULT_MAX_TOKENS = 16  # OpenAI's for this endpoint


async def completions(request: Request) -> Response:
    """The endpoint."""
    state = state_of(request)
    state.check_ready()
    limits = state.options.limits
    body = await read_request(request, CompletionRequest, limits)
    name = state.served.check_name(body.model)
    check_completion(body, limits)
    prompts = await tokenized(body, state)
    salt = salted(tenant_of(request.scope), body.cache_salt)
    jobs = [
        Job(
            prompt_token_ids=ids,
            params=completion_params(body, len(ids), state.served, limits),
            priority=body.priority or 0,
            cache_salt=salt,
        )
        for ids in prompts
    ]
    generation = state.bridge.generation(jobs, record_of(request.scope))
    writer = CompletionWriter(
        body=body, model=name, generation=generation, texts=state.bridge.texts, prompts=prompts
    )
    if body.stream:
        return EventStream(writer.events())
    reply = await until_disconnect(writer.reply(), request.receive)
    return Response(to_json(reply), media_type="application/json")


def check_completion(body: CompletionRequest, limits: Limits) -> None:
    """Rules between the fields of this endpoint."""
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(body, name)
        if value is not None and not 0 <= value <= limits.top_logprobs:
            refuse(name, value, f"it must be in 0..{limits.top_logprobs}")
    if body.stream and body.prompt_logprobs is not None:
        message = "prompt_logprobs are not available when stream is true."
        raise bad_request(message, "prompt_logprobs", "invalid_value")
    if body.stream and body.echo and body.logprobs is not None:
        message = "echo with logprobs is not available when stream is true."
        raise bad_request(message, "echo", "invalid_value")
    if body.max_tokens == 0 and not body.echo:
        refuse("max_tokens", 0, "it must be at least 1 (0 only with echo)")


def completion_params(
    body: CompletionRequest, num_prompt: int, served: ServedModel, limits: Limits
) -> SamplingParams:
    """Options of the request for a prompt of `num_prompt` tokens, checked."""
    params = common_params(body, served, limits)
    asked = body.max_tokens
    if asked is None:
        asked = min(DEFAULT_MAX_TOKENS, served.max_model_len - num_prompt)
    # An echo alone still takes a step of the engine; its token is thrown away.
    params = with_length(params, num_prompt, asked or 1, "max_tokens", served)
    prompt_logprobs = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        prompt_logprobs = max(body.logprobs, prompt_logprobs or 0)
    params = msgspec.structs.replace(
        params, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs
    )
    verify(params, served, {})
    return params


async def tokenized(body: CompletionRequest, state: ServerState) -> list[list[int]]:
    """Every prompt as token ids, within the bounds."""
    limits = state.options.limits
    prompts = split_prompts(body.prompt)
    if len(prompts) > limits.prompts or len(prompts) * (body.n or 1) > limits.sequences:
        message = (
            f"{len(prompts)} prompts times n={body.n or 1} were asked for; at most "
            f"{limits.prompts} prompts and {limits.sequences} answers are accepted."
        )
        raise bad_request(message, "prompt", "invalid_value")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    size = sum(map(len, texts))
    encoded = iter(await off_loop(size, encode_all, texts, body, state.served))
    found = [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]
    for ids in found:
        check_ids(ids, state.served)
    return found


def split_prompts(prompt: Prompt) -> list[str | list[int]]:
    """The four forms of OpenAI to a list of texts or of token-id lists."""
    if isinstance(prompt, str):
        prompt = [prompt]
    if not prompt or "" in prompt or [] in prompt:
        raise bad_request("prompt is empty.", "prompt", "empty_prompt")
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        message = "prompt mixes texts, token ids and lists; give one kind."
        raise bad_request(message, "prompt", "invalid_type")
    if kinds == {int}:
        return [cast(list[int], prompt)]
    return cast(list[str | list[int]], prompt)


def encode_all(texts: list[str], body: CompletionRequest, served: ServedModel) -> list[list[int]]:
    """Tokenize."""
    special = body.add_special_tokens is not False
    return [served.tokenizer.encode(text, add_special_tokens=special) for text in texts]


def check_ids(ids: list[int], served: ServedModel) -> None:
    """Length and range of one prompt."""
    check_prompt_length(len(ids), served, "prompt")
    low, high = min(ids), max(ids)
    if low < 0 or high >= served.vocab_size:
        bad = low if low < 0 else high
        message = f"prompt holds the token id {bad}; they go from 0 to {served.vocab_size - 1}."
        raise bad_request(message, "prompt", "invalid_value")


@dataclass(kw_only=True, slots=True)
class Answer:
    """One choice while it grows."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[list[TokenLogprob] | None] = field(default_factory=list)
    taps: Taps | None = None
    last: Delta | None = None


@dataclass(kw_only=True, slots=True)
class CompletionWriter:
    """Turns the deltas of a generation into the reply, or into the events of a stream.

    Choices are numbered prompt by prompt: number = prompt * n + index.
    """

    body: CompletionRequest
    model: str
    generation: Generation
    texts: TokenTexts
    prompts: list[list[int]]
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def n(self) -> int:
        return self.body.n or 1

    @property
    def is_echo_only(self) -> bool:
        return self.body.max_tokens == 0

    async def reply(self) -> CompletionReply:
        """The whole answer."""
        answers = [Answer() for _ in range(self.generation.num_choices)]
        async with aclosing(self.generation.deltas(whole=True)) as deltas:
            async for delta in deltas:
                answer = answers[delta.prompt * self.n + delta.index]
                answer.last = delta
                if not self.is_echo_only:
                    answer.text.append(delta.text)
                    answer.token_ids += delta.token_ids
                    answer.logprobs += delta.logprobs or []
                    answer.taps = joined(answer.taps, delta.taps)
        choices = [self.choice(number, answer) for number, answer in enumerate(answers)]
        return self.envelope(choices, self.usage())

    def choice(self, number: int, answer: Answer) -> CompletionChoice:
        """One finished answer."""
        assert answer.last is not None, number
        assert answer.last.finish_reason is not None, answer.last
        echoed = self.echoed(number // self.n)
        made = CompletionChoice(
            index=number,
            text=echoed + "".join(answer.text),
            logprobs=self.logprobs(number // self.n, answer),
            finish_reason="length" if self.is_echo_only else answer.last.finish_reason,
            stop_reason=None if self.is_echo_only else answer.last.stop_reason,
            taps=answer.taps or msgspec.UNSET,
        )
        if self.body.prompt_logprobs is not None:
            made.prompt_logprobs = self.prompt_logprobs(number // self.n)
        return made

    def echoed(self, prompt: int) -> str:
        """The prompt as text, if it is to be repeated."""
        if not self.body.echo:
            return ""
        if isinstance(self.body.prompt, str):
            return self.body.prompt
        given = self.body.prompt[prompt]
        return (
            given
            if isinstance(given, str)
            else self.texts.tokenizer.decode(self.prompts[prompt], skip_special_tokens=False)
        )

    def logprobs(self, prompt: int, answer: Answer) -> CompletionLogprobs | None:
        """Logprobs of an answer, the prompt's before it in an echo."""
        count = self.body.logprobs
        if count is None:
            return None
        ids, rows = list(answer.token_ids), list(answer.logprobs)
        if self.body.echo:
            ids = self.prompts[prompt] + ids
            rows = [None, *self.generation.prompt_logprobs(prompt), *rows]
        return self.texts.completion_logprobs(ids, rows, count, 0)

    def prompt_logprobs(self, prompt: int) -> PromptLogprobs:
        """vLLM's list for one prompt."""
        return self.texts.prompt_logprobs(self.generation.prompt_logprobs(prompt))

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The stream: text with the finish in its last event, usage if asked for, [DONE]."""
        offsets = [-1] * self.generation.num_choices  # characters sent; -1 = nothing yet
        async with aclosing(self.generation.deltas()) as deltas:
            async for delta in deltas:
                number = delta.prompt * self.n + delta.index
                chunk = self.piece(number, delta, offsets)
                if chunk is not None:
                    yield encode_event(self.envelope([chunk], self.running_usage()))
        if self.body.include_usage:
            yield encode_event(self.envelope([], self.usage()))
        yield DONE

    def piece(self, number: int, delta: Delta, offsets: list[int]) -> CompletionChoice | None:
        """A delta as a choice; None where it shows nothing new."""
        text = "" if self.is_echo_only else delta.text
        if offsets[number] < 0:
            offsets[number] = 0
            text = self.echoed(delta.prompt) + text
        logprobs = None
        if self.body.logprobs is not None and delta.token_ids:
            logprobs = self.texts.completion_logprobs(
                delta.token_ids, delta.logprobs or [], self.body.logprobs, offsets[number]
            )
            offsets[number] += sum(map(len, logprobs.tokens))
        if not text and logprobs is None and not delta.taps and delta.finish_reason is None:
            return None
        taps = delta.taps or msgspec.UNSET
        made = CompletionChoice(index=number, text=text, logprobs=logprobs, taps=taps)
        if delta.finish_reason is not None:
            made.finish_reason = "length" if self.is_echo_only else delta.finish_reason
            made.stop_reason = None if self.is_echo_only else delta.stop_reason
        return made

    def envelope(
        self, choices: list[CompletionChoice], count: Usage | msgspec.UnsetType | None
    ) -> CompletionReply:
        """What every answer and event has."""
        return CompletionReply(
            id=f"cmpl-{self.generation.id}",
            created=self.created,
            model=self.model,
            choices=choices,
            usage=count,
        )

    def running_usage(self) -> Usage | msgspec.UnsetType | None:
        """The usage of an event before the last."""
        if not self.body.include_usage:
            return msgspec.UNSET
        return self.usage() if self.body.continuous_usage else None

    def usage(self) -> Usage:
        """Tokens so far."""
        made = self.generation
        generated = 0 if self.is_echo_only else made.num_generated_tokens
        return usage(made.num_prompt_tokens, generated, made.num_cached_tokens)
