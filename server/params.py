"""A request's fields to `SamplingParams`: defaults, bounds, rules between fields.

Here: what both endpoints share. Each refusal is a 400 naming the field in the client's spelling.
Not here: what the engine checks again on its own (`SamplingParams.verify`).
"""

from typing import NoReturn

import msgspec

from fxlm.compiler.errors import InvalidRequest
from fxlm.runtime.sampling_params import SamplingParams
from fxlm.server.errors import ApiError, bad_request
from fxlm.server.limits import Limits
from fxlm.server.protocol import Sampling
from fxlm.server.served import ServedModel

# Names that SamplingParams calls by another name than the client.
Names = dict[str, str]


def refuse(param: str, value: object, why: str) -> NoReturn:
    """A 400 that shows the offending value."""
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    raise bad_request(f"{param}={shown} cannot be used: {why}.", param, "invalid_value")


def common_params(body: Sampling, served: ServedModel, limits: Limits) -> SamplingParams:
    """Everything but lengths and logprobs, which depend on the endpoint and the prompt."""
    check_rules(body, limits)
    return SamplingParams(
        n=1 if body.n is None else body.n,
        temperature=served.default("temperature", body.temperature, 1.0),
        top_p=served.default("top_p", body.top_p, 1.0),
        top_k=int(served.default("top_k", body.top_k, 0)),
        min_p=served.default("min_p", body.min_p, 0.0),
        repetition_penalty=served.default("repetition_penalty", body.repetition_penalty, 1.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        seed=body.seed,
        stop=body.stop or None,
        stop_token_ids=body.stop_token_ids or None,
        min_tokens=body.min_tokens or 0,
        logit_bias=body.logit_bias or None,
        ignore_eos=bool(body.ignore_eos),
        taps=body.taps or None,
        tap_prompt=bool(body.tap_prompt),
        steer=body.steer or None,
        skip_special_tokens=body.skip_special_tokens is not False,
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
    )


def check_rules(body: Sampling, limits: Limits) -> None:
    """Bounds of the table of limits, and rules between fields."""
    if body.stream_options is not None and not body.stream:
        message = "stream_options is only allowed when stream is true."
        raise bad_request(message, "stream_options", "invalid_value")
    if body.n is not None and not 1 <= body.n <= limits.n:
        refuse("n", body.n, f"it must be in 1..{limits.n}")
    if body.cache_salt is not None and not 0 < len(body.cache_salt) <= limits.salt_chars:
        refuse("cache_salt", body.cache_salt, f"it must have 1 to {limits.salt_chars} characters")
    for name, bound in (
        ("logit_bias", limits.logit_bias),
        ("stop_token_ids", limits.stop_token_ids),
    ):
        count = len(getattr(body, name) or ())
        if count > bound:
            message = f"{name} has {count} entries; at most {bound} are accepted."
            raise bad_request(message, name, "invalid_value")
    check_stop(body.stop, limits)


def check_stop(stop: str | list[str] | None, limits: Limits) -> None:
    """Number and size of stop strings."""
    strings = [stop] if isinstance(stop, str) else stop or []
    if len(strings) > limits.stop_strings:
        message = f"stop has {len(strings)} strings; at most {limits.stop_strings} are accepted."
        raise bad_request(message, "stop", "invalid_value")
    for text in strings:
        if not 0 < len(text) <= limits.stop_chars:
            refuse("stop", text, f"a stop string has 1 to {limits.stop_chars} characters")


def check_prompt_length(num_prompt: int, served: ServedModel, param: str) -> None:
    """An empty prompt, or one that leaves no room for a single token."""
    if num_prompt == 0:
        raise bad_request(f"{param} is empty: at least one token is needed.", param, "empty_prompt")
    if num_prompt >= served.max_model_len:
        message = (
            f"This model's maximum context length is {served.max_model_len} tokens. However, your "
            f"request has {num_prompt} input tokens. Please reduce the length of the {param}."
        )
        raise bad_request(message, param, "context_length_exceeded")


def with_length(
    params: SamplingParams,
    num_prompt: int,
    asked: int | None,
    param: str,
    served: ServedModel,
) -> SamplingParams:
    """`params` with max_tokens: what was asked, or as much as the context holds.

    Args:
        num_prompt: tokens of the prompt.
        asked: the client's bound, or None.
        param: the client's name of the bound.
    """
    room = served.max_model_len - num_prompt
    if asked is None:
        cap = int(served.defaults.get("max_new_tokens", room))
        return msgspec.structs.replace(params, max_tokens=max(1, min(room, cap)))
    if asked < 1:
        refuse(param, asked, "it must be at least 1")
    if asked > room:
        message = (
            f"{param!r} is too large: {asked}. This model's maximum context length is "
            f"{served.max_model_len} tokens and your request has {num_prompt} input tokens "
            f"({asked} > {served.max_model_len} - {num_prompt})."
        )
        raise bad_request(message, param, "context_length_exceeded")
    return msgspec.structs.replace(params, max_tokens=asked)


def verify(params: SamplingParams, served: ServedModel, names: Names) -> None:
    """The engine's own checks, with the field under the client's name."""
    try:
        params.verify(served.vocab_size, served.max_model_len)
    except InvalidRequest as error:
        param = names.get(error.param, error.param) if error.param else None
        text = str(error)
        if error.param and param and text.startswith(error.param):
            text = param + text[len(error.param) :]
        raise ApiError(400, text, param=param, code="invalid_value") from None


def salted(tenant: str, salt: str | None) -> str:
    """The engine's cache salt: the client's own, kept apart by API key where there are several.

    The length of the tenant stands before it, so that no two pairs give the same salt.
    """
    if not tenant and salt is None:
        return ""
    return f"{len(tenant)}:{tenant}{salt or ''}"
