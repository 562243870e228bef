"""Messages of a chat to what a template takes.

Here: content parts to text, tool calls of past turns, checks by position. Not here: rendering
(`fxlm.models.chat`).
"""

from typing import Any

import msgspec

from fxlm.server.decode import check_depth
from fxlm.server.errors import bad_request
from fxlm.server.limits import Limits
from fxlm.server.protocol import ContentPart, Message

MEDIA = ("image_url", "input_audio", "audio_url", "video_url", "file")


def template_messages(messages: list[Message], limits: Limits) -> list[dict[str, Any]]:
    """The messages as dicts with text content; a 400 names the position of what is wrong."""
    if not messages:
        raise bad_request("messages is empty: give at least one.", "messages", "empty_messages")
    if len(messages) > limits.messages:
        text = f"messages has {len(messages)} entries; at most {limits.messages} are accepted."
        raise bad_request(text, "messages", "invalid_value")
    return [
        template_message(message, f"messages[{index}]", limits)
        for index, message in enumerate(messages)
    ]


def template_message(message: Message, where: str, limits: Limits) -> dict[str, Any]:
    """One message; `where` is its place, for errors."""
    if not 0 < len(message.role) <= 64:
        raise bad_request(f"{where}.role must be a word.", f"{where}.role", "invalid_value")
    for name in ("audio", "function_call"):
        if getattr(message, name) is not None:
            raise bad_request(
                f"{where}.{name} is not supported.", f"{where}.{name}", "unsupported_parameter"
            )
    found: dict[str, Any] = {"role": message.role, "content": content_text(message, where)}
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        found["tool_calls"] = past_tool_calls(message.tool_calls, f"{where}.tool_calls", limits)
    reasoning = message.reasoning or message.reasoning_content
    if reasoning:
        found["reasoning"] = found["reasoning_content"] = reasoning
    return found


def content_text(message: Message, where: str) -> str:
    """The content as text; parts are joined by newlines, as vLLM does."""
    content = message.content
    if content is None:
        if message.role == "assistant":
            return message.refusal or ""
        raise bad_request(
            f"{where}.content is required.", f"{where}.content", "missing_required_parameter"
        )
    if isinstance(content, str):
        return content
    return "\n".join(
        part_text(part, f"{where}.content[{index}]") for index, part in enumerate(content)
    )


def part_text(part: ContentPart, where: str) -> str:
    """The text of one part; media are refused by name."""
    text = {"text": part.text, "refusal": part.refusal}.get(part.type)
    if text is not None:
        return text
    if part.type in ("text", "refusal"):
        param = f"{where}.{part.type}"
        raise bad_request(f"{param} is required.", param, "missing_required_parameter")
    kind = "Media" if part.type in MEDIA else "Unknown"
    message = f"{kind} content ({part.type[:40]!r}) is not supported: this server takes text."
    raise bad_request(message, f"{where}.type", "unsupported_content")


def past_tool_calls(
    calls: list[dict[str, Any]], where: str, limits: Limits
) -> list[dict[str, Any]]:
    """Tool calls of an earlier turn, their arguments parsed, as templates expect them."""
    check_depth(calls, limits.json_depth, where)
    return [tool_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def tool_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """One call; its arguments arrive as JSON in a string."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        param = f"{where}.function"
        raise bad_request(f"{param} must be an object with a name.", param, "invalid_value")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments) if arguments.strip() else {}
        except (msgspec.DecodeError, RecursionError):
            param = f"{where}.function.arguments"
            raise bad_request(f"{param} is not valid JSON.", param, "invalid_value") from None
        check_depth(arguments, 32, f"{where}.function.arguments")
    return {**call, "function": {**function, "arguments": arguments}}
