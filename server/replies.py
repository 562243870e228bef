"""The JSON that clients get, as types: OpenAI's objects, with vLLM's additions.

Not here: filling them in (`chat.py`, `completions.py`).
"""

from typing import Any, Literal

import msgspec

from fxlm.runtime.messages import Taps  # their bytes are base64 in JSON

FinishReason = Literal["stop", "length"]


class PromptTokensDetails(msgspec.Struct, kw_only=True):
    """Where prompt tokens came from."""

    cached_tokens: int = 0


class Usage(msgspec.Struct, kw_only=True):
    """Tokens counted."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails = msgspec.field(default_factory=PromptTokensDetails)


def usage(prompt: int, completion: int, cached: int) -> Usage:
    """`Usage` with its sum."""
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )


class TopLogprob(msgspec.Struct, kw_only=True):
    """One alternative at a position; `bytes` are the token's own, even if half a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(msgspec.Struct, kw_only=True):
    """The drawn token and its alternatives."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(msgspec.Struct, kw_only=True):
    """Logprobs of a chat choice."""

    content: list[TokenLogprobs]
    refusal: None = None


class ReplyMessage(msgspec.Struct, kw_only=True):
    """What the assistant said."""

    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    """One of the n answers."""

    index: int
    message: ReplyMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    taps: Taps | msgspec.UnsetType = msgspec.UNSET


class ChatReply(msgspec.Struct, kw_only=True):
    """Answer of /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"


class ChatDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a chunk adds; nothing in the last one."""

    role: str | None = None
    content: str | None = None


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """One choice's part of a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | msgspec.UnsetType | None = msgspec.UNSET
    taps: Taps | msgspec.UnsetType = msgspec.UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    """One event of a chat stream; `usage` is left out unless usage was asked for."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    object: str = "chat.completion.chunk"


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Logprobs of a completion, position by position; the first token of an echo has none."""

    text_offset: list[int] = msgspec.field(default_factory=list)
    token_logprobs: list[float | None] = msgspec.field(default_factory=list)
    tokens: list[str] = msgspec.field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = msgspec.field(default_factory=list)


class PromptLogprob(msgspec.Struct, kw_only=True):
    """vLLM's entry of `prompt_logprobs`, under its token id."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One answer, or one chunk's part of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | msgspec.UnsetType | None = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET
    taps: Taps | msgspec.UnsetType = msgspec.UNSET


class CompletionReply(msgspec.Struct, kw_only=True):
    """Answer of /v1/completions, and one event of its stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    object: str = "text_completion"


class ModelCard(msgspec.Struct, kw_only=True):
    """A served model, as /v1/models shows it."""

    id: str
    created: int
    root: str
    max_model_len: int
    parent: None = None
    owned_by: str = "fxlm"
    object: str = "model"


class ModelList(msgspec.Struct, kw_only=True):
    """Answer of /v1/models."""

    data: list[ModelCard]
    object: str = "list"


def to_json(value: Any) -> bytes:
    """Compact JSON."""
    return msgspec.json.encode(value)
