"""Every bound on what one request may ask, in one table.

Sizes of the model (context, vocabulary) are not here: they come from the checkpoint.
"""

from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds applied while a request is parsed, before anything is computed."""

    body_bytes: int = 8 * MIB
    body_seconds: float = 60.0  # to receive the whole body
    json_depth: int = 32  # of free-form values (chat_template_kwargs, tool_calls)
    messages: int = 4096
    prompts: int = 1024  # of one completions request, as vLLM
    sequences: int = 1024  # prompts * n of one request
    n: int = 128  # as OpenAI
    stop_strings: int = 16
    stop_chars: int = 1024  # of one stop string
    stop_token_ids: int = 256
    logit_bias: int = 1024
    top_logprobs: int = 20  # as OpenAI and vLLM's --max-logprobs
    salt_chars: int = 256
    header_bytes: int = 64 * 1024  # request line and headers together
