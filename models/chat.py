"""Chat templates: messages to one text, as transformers' ``apply_chat_template`` renders them.

A template is code that comes with a checkpoint, and its arguments come from clients, so it
runs in a sandbox within limits (`fxlm.models.sandbox`), and sees plain JSON values alone.
Not here: tokenizing the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from fxlm.compiler.errors import InvalidModel, InvalidRequest
from fxlm.models import sandbox
from fxlm.models.checkpoint import read_json
from fxlm.models.tokenizer import named_tokens

RENDER_SECONDS = 10.0
MAX_TEXT = 1 << 26  # characters of a rendered conversation
MAX_DEPTH = 64  # nesting of messages and tools
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """The chat template of a checkpoint, or several by name.

    Attributes:
        sources: template texts by name; a single one is called ``default``.
        special_tokens: what templates know as ``bos_token``, ``eos_token``...
    """

    def __init__(
        self,
        sources: str | Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
        *,
        seconds: float = RENDER_SECONDS,
    ) -> None:
        """Compile the templates.

        Raises:
            InvalidModel: one is not a valid template; carries the line.
        """
        self.sources = {"default": sources} if isinstance(sources, str) else dict(sources)
        self.special_tokens = dict(special_tokens or {})
        self._seconds = seconds
        environment = sandbox.environment()
        self._compiled: dict[str, jinja2.Template] = {}
        for name, source in self.sources.items():
            try:
                self._compiled[name] = environment.from_string(source)
            except jinja2.TemplateSyntaxError as error:
                raise InvalidModel(
                    f"chat template {name!r} is invalid at line {error.lineno}: {error.message}"
                ) from error
            except (RecursionError, SyntaxError, ValueError) as error:
                raise InvalidModel(f"chat template {name!r} is invalid: {error}") from error

    @classmethod
    def open(cls, path: Path | str) -> ChatTemplate | None:
        """Read the template of a checkpoint directory; None if it has none.

        ``chat_template.jinja`` and ``additional_chat_templates/*.jinja`` win over the
        ``chat_template`` of ``tokenizer_config.json`` (a text, or a list of named ones).
        """
        path = Path(path)
        file = path / "tokenizer_config.json"
        config = read_json(file) if file.is_file() else {}
        special = path / "special_tokens_map.json"
        if special.is_file():
            config = {**read_json(special), **config}
        sources = _files(path) or _configured(config.get("chat_template"))
        return cls(sources, named_tokens(config)) if sources else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The conversation as text.

        Args:
            messages: dicts with ``role`` and ``content``; keys that are None count as absent.
            add_generation_prompt: open the assistant's turn at the end.
            continue_final_message: end in the middle of the last message.
            tools: JSON schemas; documents: dicts with title and text.
            kwargs: further variables of the template; they win over special tokens.

        Raises:
            InvalidRequest: the template refuses the messages, fails, or takes too long.
        """
        if not messages:
            raise InvalidRequest("messages is empty: give at least one message", "messages")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other",
                "continue_final_message",
            )
        chat = [_message(message) for message in messages]
        ending = _mark_final(chat) if continue_final_message else ""
        variables = {**self.special_tokens, **_plain(kwargs)}
        reserved = {"messages", "tools", "documents", "add_generation_prompt"} & set(kwargs)
        if reserved:
            raise InvalidRequest(f"{sorted(reserved)} cannot be set here", "chat_template_kwargs")
        text = self._render(
            self._choose(tools), messages=chat, tools=_plain(tools), documents=_plain(documents),
            add_generation_prompt=add_generation_prompt, **variables,
        )  # fmt: skip
        return _cut_final(text, ending) if continue_final_message else text

    def _choose(self, tools: Any) -> jinja2.Template:
        if tools is not None and "tool_use" in self._compiled and len(self._compiled) > 1:
            return self._compiled["tool_use"]
        if "default" in self._compiled:
            return self._compiled["default"]
        raise InvalidRequest(
            f"the model has several chat templates and no default: {sorted(self._compiled)}"
        )

    def _render(self, template: jinja2.Template, **variables: Any) -> str:
        try:
            with sandbox.time_limit(self._seconds):
                return _collect(template.generate(**variables))
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                f"the model's chat template refuses the messages: {error}", "messages"
            ) from error
        except Exception as error:  # template code may raise anything; the request is over
            raise InvalidRequest(
                f"the model's chat template fails on the messages: {type(error).__name__}: {error}",
                "messages",
            ) from error


def _collect(parts: Iterator[str]) -> str:
    kept, size = [], 0
    for part in parts:
        sandbox.tick()
        size += len(part)
        if size > MAX_TEXT:
            raise jinja2.TemplateError(f"its text is longer than {MAX_TEXT} characters")
        kept.append(part)
    return "".join(kept)


def _files(path: Path) -> dict[str, str]:
    files = {p.stem: p for p in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    if (path / "chat_template.jinja").is_file():
        files["default"] = path / "chat_template.jinja"
    try:
        return {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidModel(f"a chat template of {path} cannot be read: {error}") from error


def _configured(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        return {str(entry["name"]): str(entry["template"]) for entry in value}
    return {str(k): str(v) for k, v in value.items()} if isinstance(value, Mapping) else {}


def _plain(value: Any, depth: int = 0) -> Any:
    """Rebuild a value out of JSON types; templates must not get at methods of rich objects."""
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"messages are nested deeper than {MAX_DEPTH}", "messages")
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {f.name: _plain(getattr(value, f.name), depth + 1) for f in fields}
    if callable(getattr(value, "model_dump", None)):
        return _plain(value.model_dump(), depth + 1)
    return f"<{type(value).__name__}>"


def _message(message: Any) -> dict[str, Any]:
    plain = _plain(message)
    if not isinstance(plain, dict):
        raise InvalidRequest(f"a message must be an object, not {message!r:.100}", "messages")
    plain = {key: value for key, value in plain.items() if value is not None}
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _mark_final(chat: list[dict[str, Any]]) -> str:
    """Put a tag at the end of the last message; returns that message's text."""
    final = chat[-1].get("content")
    if isinstance(final, list):
        block = next((b for b in reversed(final) if isinstance(b, dict) and "text" in b), None)
        if block is not None:
            text = str(block["text"])
            block["text"] = text + _TAG
            return text
    if isinstance(final, str):
        chat[-1]["content"] = final + _TAG
        return final
    raise InvalidRequest("the final message has no text to continue", "continue_final_message")


def _cut_final(text: str, ending: str) -> str:
    tag = _TAG.strip()
    if ending.strip() not in text or tag not in text:
        raise InvalidRequest(
            "the chat template drops the final message, so it cannot be continued",
            "continue_final_message",
        )
    at = text.rindex(tag)
    kept = text[:at]
    return kept if text[at : at + len(_TAG)] == _TAG else kept.rstrip()
