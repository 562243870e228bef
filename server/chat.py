"""POST /v1/chat/completions.

Here: messages to token ids, the endpoint's own fields, and its replies, whole and streamed.
Not here: fields shared with /v1/completions (`params.py`), the engine (`bridge.py`).
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from fxlm.compiler.errors import InvalidRequest
from fxlm.runtime.messages import Taps, joined
from fxlm.runtime.sampling_params import SamplingParams
from fxlm.server.auth import tenant_of
from fxlm.server.bridge import LONG_TEXT, Delta, Generation, Job, off_loop
from fxlm.server.decode import check_depth, read_request
from fxlm.server.errors import bad_request
from fxlm.server.limits import Limits
from fxlm.server.messages import template_messages
from fxlm.server.params import (
    check_prompt_length,
    common_params,
    refuse,
    salted,
    verify,
    with_length,
)
from fxlm.server.protocol import ChatRequest
from fxlm.server.record import record_of
from fxlm.server.replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatReply,
    ChoiceLogprobs,
    ReplyMessage,
    Usage,
    to_json,
    usage,
)
from fxlm.server.served import ServedModel
from fxlm.server.sse import DONE, EventStream, encode_event, until_disconnect
from fxlm.server.state import ServerState, state_of
from fxlm.server.texts import TokenTexts

# Names that a client may not set through chat_template_kwargs: they are ours or are code.
RESERVED = frozenset(
    {"messages", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt",
     "continue_final_message", "conversation", "return_dict", "return_tensors", "padding",
     "truncation", "max_length", "self"}
)  # fmt: skip


async def chat_completions(request: Request) -> Response:
    """The endpoint."""
    state = state_of(request)
    state.check_ready()
    limits = state.options.limits
    body = await read_request(request, ChatRequest, limits)
    name = state.served.check_name(body.model)
    check_chat(body, limits)
    ids = await prompt_ids(body, state)
    job = Job(
        prompt_token_ids=ids,
        params=chat_params(body, len(ids), state.served, limits),
        priority=body.priority or 0,
        cache_salt=salted(tenant_of(request.scope), body.cache_salt),
    )
    generation = state.bridge.generation([job], record_of(request.scope))
    writer = ChatWriter(body=body, model=name, generation=generation, texts=state.bridge.texts)
    if body.stream:
        return EventStream(writer.events())
    reply = await until_disconnect(writer.reply(), request.receive)
    return Response(to_json(reply), media_type="application/json")


def check_chat(body: ChatRequest, limits: Limits) -> None:
    """Rules between the fields of this endpoint."""
    if body.top_logprobs is not None:
        if body.top_logprobs > 0 and not body.logprobs:
            message = "top_logprobs requires logprobs to be true."
            raise bad_request(message, "top_logprobs", "invalid_value")
        if not 0 <= body.top_logprobs <= limits.top_logprobs:
            refuse("top_logprobs", body.top_logprobs, f"it must be in 0..{limits.top_logprobs}")
    if body.add_generation_prompt and body.continue_final_message:
        message = "continue_final_message and add_generation_prompt cannot both be true."
        raise bad_request(message, "continue_final_message", "invalid_value")
    extra = body.chat_template_kwargs or {}
    check_depth(extra, limits.json_depth, "chat_template_kwargs")
    for name in extra:
        if name in RESERVED or not name.isidentifier():
            message = f"chat_template_kwargs cannot set {name[:80]!r}."
            raise bad_request(message, "chat_template_kwargs", "invalid_value")


def chat_params(
    body: ChatRequest, num_prompt: int, served: ServedModel, limits: Limits
) -> SamplingParams:
    """Options of the request, checked."""
    params = common_params(body, served, limits)
    param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    params = with_length(params, num_prompt, getattr(body, param), param, served)
    if body.logprobs:
        params = msgspec.structs.replace(params, logprobs=body.top_logprobs or 0)
    verify(params, served, {"max_tokens": param, "logprobs": "top_logprobs"})
    return params


async def prompt_ids(body: ChatRequest, state: ServerState) -> list[int]:
    """Messages to token ids, on another thread where that may take long."""
    messages = template_messages(body.messages, state.options.limits)
    size = sum(len(message["content"]) for message in messages)
    if body.chat_template_kwargs:  # a template's loops may follow what the client gives
        size += LONG_TEXT
    ids = await off_loop(size, encode_chat, body, messages, state.served)
    check_prompt_length(len(ids), state.served, "messages")
    return ids


def encode_chat(
    body: ChatRequest, messages: list[dict[str, Any]], served: ServedModel
) -> list[int]:
    """Render and tokenize; the template writes its own special tokens."""
    if served.chat_template is None:
        message = f"The model {served.names[0]} has no chat template; use /v1/completions."
        raise bad_request(message, "messages", "no_chat_template")
    extra = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        extra.setdefault("reasoning_effort", body.reasoning_effort)
    going_on = bool(body.continue_final_message)
    opens = not going_on if body.add_generation_prompt is None else body.add_generation_prompt
    try:
        text = served.chat_template.render(
            messages, add_generation_prompt=opens, continue_final_message=going_on, **extra
        )
    except InvalidRequest as error:
        raise bad_request(str(error), error.param or "messages", "template_error") from None
    return served.tokenizer.encode(text, add_special_tokens=bool(body.add_special_tokens))


@dataclass(kw_only=True, slots=True)
class Answer:
    """One choice while it grows."""

    text: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    taps: Taps | None = None
    num_tokens: int = 0
    last: Delta | None = None


@dataclass(kw_only=True, slots=True)
class ChatWriter:
    """Turns the deltas of a generation into the reply, or into the events of a stream."""

    body: ChatRequest
    model: str
    generation: Generation
    texts: TokenTexts
    created: int = field(default_factory=lambda: int(time.time()))

    async def reply(self) -> ChatReply:
        """The whole answer."""
        answers = [Answer() for _ in range(self.generation.num_choices)]
        async with aclosing(self.generation.deltas(whole=True)) as deltas:
            async for delta in deltas:
                answer = answers[delta.index]
                answer.text.append(delta.text)
                answer.logprobs += self.logprobs_of(delta)
                answer.taps = joined(answer.taps, delta.taps)
                answer.last = delta
        return ChatReply(
            id=f"chatcmpl-{self.generation.id}",
            created=self.created,
            model=self.model,
            choices=[self.choice(index, answer) for index, answer in enumerate(answers)],
            usage=self.usage(),
        )

    def choice(self, index: int, answer: Answer) -> ChatChoice:
        """One finished answer."""
        assert answer.last is not None, index
        assert answer.last.finish_reason is not None, answer.last
        return ChatChoice(
            index=index,
            message=ReplyMessage(content="".join(answer.text)),
            logprobs=ChoiceLogprobs(content=answer.logprobs) if self.body.logprobs else None,
            finish_reason=answer.last.finish_reason,
            stop_reason=answer.last.stop_reason,
            taps=answer.taps or msgspec.UNSET,
        )

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The stream: roles, text, a finish a choice, usage if asked for, [DONE]."""
        opened = False
        async with aclosing(self.generation.deltas()) as deltas:
            async for delta in deltas:
                if not opened:
                    opened = True
                    for index in range(self.generation.num_choices):
                        yield self.chunk(index, ChatDelta(role="assistant", content=""))
                found = self.logprobs_of(delta)
                if delta.text or found or delta.taps:
                    yield self.chunk(
                        delta.index,
                        ChatDelta(content=delta.text),
                        logprobs=ChoiceLogprobs(content=found) if found else None,
                        taps=delta.taps or msgspec.UNSET,
                    )
                if delta.finish_reason is not None:
                    yield self.chunk(
                        delta.index,
                        ChatDelta(),
                        finish_reason=delta.finish_reason,
                        stop_reason=delta.stop_reason,
                    )
        if self.body.include_usage:
            yield encode_event(self.envelope([], self.usage()))
        yield DONE

    def chunk(self, index: int, delta: ChatDelta, **more: Any) -> bytes:
        """One event about one choice."""
        count: Usage | msgspec.UnsetType | None = msgspec.UNSET
        if self.body.include_usage:
            count = self.usage() if self.body.continuous_usage else None
        choice = ChatChunkChoice(index=index, delta=delta, **more)
        return encode_event(self.envelope([choice], count))

    def envelope(
        self, choices: list[ChatChunkChoice], count: Usage | msgspec.UnsetType | None
    ) -> ChatChunk:
        """What every event has."""
        return ChatChunk(
            id=f"chatcmpl-{self.generation.id}",
            created=self.created,
            model=self.model,
            choices=choices,
            usage=count,
        )

    def logprobs_of(self, delta: Delta) -> list[Any]:
        """The tokens of a delta with their alternatives, if they were asked for."""
        if not self.body.logprobs:
            return []
        return self.texts.chat_logprobs(delta.logprobs or [], self.body.top_logprobs or 0)

    def usage(self) -> Usage:
        """Tokens so far."""
        made = self.generation
        return usage(made.num_prompt_tokens, made.num_generated_tokens, made.num_cached_tokens)
