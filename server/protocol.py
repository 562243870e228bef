"""The JSON a client may send, as types.

Here: the request structs of /v1/chat/completions and /v1/completions, in three layers that both
share: fields that are honoured (`Sampling`), fields that are accepted and change nothing
(`Ignored`), and fields that would change the meaning but are not served (`Unsupported`: anything
but a neutral value is a 400 naming the field). A field of none of the layers is a 400 too.
Not here: decoding (`decode.py`), bounds and defaults (`params.py`), replies (`replies.py`).

``null`` means "not given" for every optional field, as OpenAI has it.
"""

from typing import Annotated, Any

import msgspec

Seed = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Small = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
Prompt = str | list[str | int | list[int]]


class Ignored(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields that concern OpenAI's accounting, routing or caching: accepted, without effect."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    prediction: Any = None  # a hint for speed; never changes the answer
    parallel_tool_calls: Any = None  # without tools it has no meaning


class Unsupported(Ignored, kw_only=True, forbid_unknown_fields=True):
    """Fields that would change the answer and are not served; `NEUTRAL` lists what may pass."""

    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    modalities: Any = None
    audio: Any = None
    moderation: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    best_of: Any = None
    suffix: Any = None
    prompt_embeds: Any = None
    use_beam_search: Any = None
    length_penalty: Any = None
    truncate_prompt_tokens: Any = None
    truncation_side: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    logprob_token_ids: Any = None
    spaces_between_special_tokens: Any = None
    thinking_token_budget: Any = None
    include_reasoning: Any = None
    documents: Any = None
    chat_template: Any = None  # a template is code: it comes from the operator alone
    media_io_kwargs: Any = None
    mm_processor_kwargs: Any = None
    return_token_ids: Any = None
    return_tokens_as_token_ids: Any = None
    repetition_detection: Any = None
    stream_interval: Any = None
    kv_transfer_params: Any = None
    vllm_xargs: Any = None


# Values that mean the same as leaving the field out.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("none",),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "best_of": (1,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "bad_words": ([],),
    "spaces_between_special_tokens": (True,),
    "include_reasoning": (True,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "stream_interval": (1,),
    "vllm_xargs": ({},),
}


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a stream carries beside text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Any = None  # OpenAI's padding against traffic analysis: no effect here


class Sampling(Unsupported, kw_only=True, forbid_unknown_fields=True):
    """Fields that both endpoints honour, with OpenAI's and vLLM's names."""

    model: str | None = None
    n: Small | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Small | None = None
    min_p: float | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Small] | None = None
    max_tokens: Small | None = None
    min_tokens: Small | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = None
    priority: Small | None = None
    taps: list[str] | None = None
    tap_prompt: bool | None = None
    steer: dict[str, list[float]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream carries the usage so far."""
        return bool(self.include_usage and self.stream_options.continuous_usage_stats)  # type: ignore[union-attr]


class ContentPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A part of a message; only ``text`` (and an assistant's ``refusal``) can be served."""

    type: str
    text: str | None = None
    refusal: str | None = None
    cache_control: Any = None
    prompt_cache_breakpoint: Any = None
    image_url: Any = None
    input_audio: Any = None
    audio_url: Any = None
    video_url: Any = None
    file: Any = None


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A message of a conversation; what an assistant replied may be sent back as it came."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None


class ChatRequest(Sampling, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: Small | None = None
    logprobs: bool | None = None
    top_logprobs: Small | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    # Honoured by /v1/completions alone:
    echo: Any = None
    prompt_logprobs: Any = None


class CompletionRequest(Sampling, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: Small | None = None
    prompt_logprobs: Small | None = None
