"""The model as the server sees it: names, sizes, tokenizer, template, default options.

Not here: where it comes from (`fxlm.runtime.launch`), what the engine does with it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fxlm.server.errors import ApiError


class Tokenizer(Protocol):
    """What the server asks of a tokenizer (`fxlm.models.tokenizer.Tokenizer` is one)."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, even where they are half a character."""
        ...


class ChatTemplate(Protocol):
    """What the server asks of a chat template (`fxlm.models.chat.ChatTemplate` is one)."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The conversation as text; raises `InvalidRequest` where the template refuses it."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """One served model.

    Args:
        names: names that clients may call it by; the first is the one shown.
        root: where it came from (a directory or hub id), shown by /v1/models.
        max_model_len: context, in tokens: prompt and output together.
        vocab_size: token ids are below it.
        max_num_seqs: sequences that run at once; the admission limit counts from it.
        eos_token_ids: tokens that end an output.
        defaults: options of the checkpoint's generation_config that apply where a request
            leaves them out (temperature, top_p, top_k, min_p, repetition_penalty,
            max_new_tokens), as in vLLM.
        chat_template: None where the checkpoint has none.
    """

    names: tuple[str, ...]
    root: str
    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None = None
    eos_token_ids: tuple[int, ...] = ()
    defaults: Mapping[str, float] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    def check_name(self, name: str | None) -> str:
        """The name to answer under; 404 for one that is not served. None is the first."""
        if name is None:
            return self.names[0]
        if name not in self.names:
            known = ", ".join(self.names)
            message = f"The model {name[:200]!r} does not exist here; served: {known}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return name

    def default(self, name: str, given: float | None, otherwise: float) -> float:
        """The request's value, else the checkpoint's, else `otherwise`."""
        return given if given is not None else self.defaults.get(name, otherwise)
