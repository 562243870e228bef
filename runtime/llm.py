"""LLM: a model in this process, for scripts and notebooks; names as vLLM users know them.

    from fxlm import LLM, SamplingParams
    llm = LLM()                                   # the bundled model
    for out in llm.generate(["def add(a, b):"], SamplingParams(temperature=0, max_tokens=16)):
        print(out.outputs[0].text)

Not here: HTTP (`fxlm.server`), several processes (`service`).
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from fxlm.compiler.errors import InvalidRequest
from fxlm.models.chat import ChatTemplate
from fxlm.models.checkpoint import resolve
from fxlm.models.tokenizer import Tokenizer
from fxlm.runtime.compile import Report
from fxlm.runtime.explain import stamp
from fxlm.runtime.options import EngineOptions, from_mapping
from fxlm.runtime.outputs import OutputProcessor, RequestOutput
from fxlm.runtime.request import Request
from fxlm.runtime.sampling_params import SamplingParams
from fxlm.runtime.worker import build_engine

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]


class LLM:
    """An engine in process; calls from several threads take turns.

    Args:
        model: directory, hub id, ``bundled`` or ``bundled-draft``.
        tokenizer: directory or hub id, if it is not the model's own.
        passes: graph passes of your own: functions decorated with ``@graph_pass``, or
            ``file.py:name``.
        skip_tokenizer_init: token ids only.
        options: see `fxlm.runtime.options.EngineOptions` (``dtype``, ``max_model_len``,
            ``enable_prefix_caching``, ``enforce_eager``, ``kv_cache_memory_bytes``, ...).

    Raises:
        InvalidOption: an unknown option or a value that cannot be used.
        InvalidModel, UnsupportedModel, PassError, OutOfMemory: see `fxlm.compiler.errors`.
    """

    def __init__(
        self,
        model: str = "bundled",
        *,
        tokenizer: str | None = None,
        passes: Sequence[Any] = (),
        skip_tokenizer_init: bool = False,
        **options: Any,
    ) -> None:
        self.options: EngineOptions = from_mapping(
            {**options, "model": str(model), "passes": tuple(passes)}
        )
        self.engine, self.plan, compilation = build_engine(self.options, _progress())
        self.artifact = compilation.artifact
        self.program = compilation.program  # None if the artifact was there already
        checkpoint = compilation.checkpoint
        _say(stamp.line(self.artifact, checkpoint.weights_digest()))
        self._tokenizer: Tokenizer | None = None
        if not skip_tokenizer_init:
            place = resolve(tokenizer) if tokenizer else checkpoint.path
            trust = self.options.trust_remote_code
            self._tokenizer = Tokenizer.open(place, trust_remote_code=trust)
        self._template = ChatTemplate.open(checkpoint.path)
        self._defaults = checkpoint.generation_config
        self._eos = list(self._tokenizer.eos_token_ids) if self._tokenizer else []
        self._count = itertools.count()
        self._lock = threading.Lock()  # the engine is for one thread at a time

    @property
    def taps(self) -> dict[str, tuple[int, ...]]:
        """Points that requests may tap, and the shape of a token's row there."""
        return dict(self.engine.spec.taps)

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer; an error if the engine was made without one."""
        if self._tokenizer is None:
            raise InvalidRequest("this LLM was made with skip_tokenizer_init: give token ids")
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Parameters as the checkpoint's generation_config sets them."""
        given = {
            name: self._defaults[name]
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if self._defaults.get(name) is not None
        }
        if not self._defaults.get("do_sample", True):
            given["temperature"] = 0.0
        return SamplingParams(**given)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts.

        Args:
            prompts: text, token ids, ``{"prompt": ...}``, ``{"prompt_token_ids": [...]}``
                (with an optional ``cache_salt``), or a list of any of these. A list of ints
                is one prompt.
            sampling_params: one for all, or one a prompt; the checkpoint's defaults if None.
            use_tqdm: show progress when there are several prompts.

        Returns:
            One `RequestOutput` a prompt, in order.

        Raises:
            InvalidRequest: a prompt or a parameter cannot be served; nothing was run.
        """
        many = _as_list(prompts)
        params = self._params_for(sampling_params, len(many))
        requests = [self._request(p, s) for p, s in zip(many, params, strict=True)]
        with self._lock:
            return self._run(requests, use_tqdm and len(requests) > 1)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations.

        Args:
            messages: one conversation, or a list of them; each message has role and content.
            add_generation_prompt: end with the header of an assistant's message.
            continue_final_message: go on with the last message instead.
            chat_template_kwargs: passed on to the template.

        Raises:
            InvalidRequest: the model has no chat template, or the template refuses.
        """
        if self._template is None:
            raise InvalidRequest(f"{self.options.model} has no chat template; use generate()")
        single = bool(messages) and isinstance(messages[0], Mapping)
        many: Any = [messages] if single else messages
        tokenizer = self.get_tokenizer()
        prompts = []
        for conversation in many:
            text = self._template.render(
                conversation, add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message, **(chat_template_kwargs or {}),
            )  # fmt: skip
            ids = tokenizer.encode(text, add_special_tokens=False)
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    # ---- inside ----------------------------------------------------------------------------

    def _run(self, requests: list[tuple[Request, str | None]], show: bool) -> list[RequestOutput]:
        processor = OutputProcessor(self._tokenizer)
        for request, _ in requests:  # all are checked before any is queued
            request.verify(self.engine.spec.vocab_size, self.engine.spec.max_model_len)
        done: dict[str, RequestOutput] = {}
        bar = _bar(len(requests)) if show else None
        try:
            for request, text in requests:
                self.engine.add_request(request)
                processor.add_request(request, text, "final")
            while self.engine.has_unfinished():
                processed = processor.process(self.engine.step())
                for request_id, index in processed.aborts:
                    self.engine.abort(request_id, index)
                for output in processed.outputs:
                    done[output.request_id] = output
                    if bar is not None:
                        bar.update(1)
        except BaseException:  # Ctrl-C, or a request refused, must not leave others behind
            for request, _ in requests:
                self.engine.abort(request.request_id)
            raise
        finally:
            if bar is not None:
                bar.close()
        return [done[request.request_id] for request, _ in requests]

    def _request(self, prompt: Prompt, params: SamplingParams) -> tuple[Request, str | None]:
        text, ids, salt = self._parse(prompt)
        request = Request(
            request_id=str(next(self._count)), prompt_token_ids=ids, params=params,
            eos_token_ids=self._eos, arrival=time.monotonic(), cache_salt=salt,
        )  # fmt: skip
        return request, text

    def _parse(self, prompt: Prompt) -> tuple[str | None, list[int], str]:
        """Text if there is one, token ids, cache salt."""
        if isinstance(prompt, str):
            return prompt, self.get_tokenizer().encode(prompt), ""
        if not isinstance(prompt, Mapping):
            return None, _token_ids(prompt), ""
        unknown = set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"}
        if unknown:
            raise InvalidRequest(f"a prompt has no field {sorted(unknown)[0]!r}", "prompts")
        text = prompt.get("prompt")
        ids = prompt.get("prompt_token_ids")
        if ids is None:
            if not isinstance(text, str):
                raise InvalidRequest("a prompt needs 'prompt' or 'prompt_token_ids'", "prompts")
            ids = self.get_tokenizer().encode(text)
        return text, _token_ids(ids), str(prompt.get("cache_salt", ""))

    def _params_for(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if given is None:
            return [self.get_default_sampling_params()] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        if not all(isinstance(item, SamplingParams) for item in given):
            raise InvalidRequest("sampling_params takes SamplingParams", "sampling_params")
        if len(given) != count:
            raise InvalidRequest(
                f"{len(given)} sampling_params for {count} prompts: give one, or one a prompt",
                "sampling_params",
            )
        return list(given)


def _as_list(prompts: Any) -> list[Any]:
    """Prompts as a list; a text, a dict and a list of ints are one prompt each."""
    if isinstance(prompts, (str, bytes, Mapping)):
        return [prompts]
    try:
        many = list(prompts)
    except TypeError:
        raise InvalidRequest(
            f"prompts is a {type(prompts).__name__}; give text, token ids, a dict or a list",
            "prompts",
        ) from None
    return [many] if many and all(map(_is_token, many)) else many


def _token_ids(given: Any) -> list[int]:
    """Token ids as plain ints; arrays of integers are welcome."""
    if not isinstance(given, (str, bytes)):
        try:
            items = list(given)
        except TypeError:
            items = [None]
        if all(map(_is_token, items)):
            return [int(item) for item in items]
    raise InvalidRequest(
        f"{str(given)[:80]!r} is no prompt; give text, or token ids as whole numbers", "prompts"
    )


def _is_token(item: Any) -> bool:
    return isinstance(item, Integral) and not isinstance(item, bool)


def _progress() -> Report:
    """Compiling is announced on standard error."""

    def report(stage: str, seconds: float) -> None:
        if stage.startswith(("compile", "capture")):
            _say(f"{stage} {seconds:.1f} s")

    return report


def _say(text: str) -> None:
    sys.stderr.write(f"fxlm: {text}\n")


def _bar(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="Processed prompts", dynamic_ncols=True)
