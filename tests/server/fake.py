"""A model of bytes and an engine without a model, for the server's tests.

Every byte is a token, 256 ends the text. The engine writes `FakeEngine.reply`, one token a turn
of the event loop, and does what the knobs say: hold, fail, die.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from fxlm.compiler.errors import EngineDead, InvalidRequest
from fxlm.runtime.messages import Output, Stats, TokenLogprob
from fxlm.runtime.request import Request
from fxlm.server.bridge import Sink
from fxlm.server.served import ServedModel

EOS = 256
VOCAB = 257
REPLY = "Hello, wörld!"


class ByteTokenizer:
    """Bytes as tokens."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.raw(ids, skip_special_tokens).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self.raw([token_id], False)

    def raw(self, ids: Sequence[int], skip: bool) -> bytes:
        return b"".join(bytes([i]) if i < EOS else b"" if skip else b"<eos>" for i in ids)


class PlainTemplate:
    """`role: content` lines."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        if messages[0]["role"] == "forbidden":
            raise InvalidRequest("the template refuses the role forbidden")
        text = "\n".join(f"{m['role']}: {m['content']}" for m in messages)
        text += "".join(f" {key}={value}" for key, value in kwargs.items())
        return text + ("\nassistant:" if add_generation_prompt else "")


class FakeEngine:
    """An engine that writes `reply` whatever it is asked."""

    def __init__(self, reply: str = REPLY) -> None:
        self.stats = Stats(num_running=3, num_waiting=2, kv_cache_usage=0.25, num_preemptions=4,
                           prefix_queries=100, prefix_hits=60, iteration_tokens=[1, 2],
                           iteration_tokens_sum=17)  # fmt: skip
        self.reply = reply
        self.hold = False  # tokens after the first wait
        self.hold_first = False  # the first token waits too
        self.fail_after: int | None = None  # tokens until every request fails
        self.dead: str | None = None
        self.gone = asyncio.Event()  # its process has ended
        self.requests: list[Request] = []
        self.aborted: list[tuple[str, int]] = []
        self.sinks: dict[str, Sink] = {}
        self.tasks: dict[tuple[str, int], asyncio.Task[None]] = {}

    def trouble(self) -> str | None:
        return self.dead

    async def ended(self) -> str:
        await self.gone.wait()
        assert self.dead is not None
        return self.dead

    def submit(self, request: Request, sink: Sink) -> None:
        if self.dead is not None:
            raise EngineDead(self.dead)
        request.verify(VOCAB, 1 << 20)
        self.requests.append(request)
        self.sinks[request.request_id] = sink
        for index in range(request.params.n):
            task = asyncio.ensure_future(self.write(request, index, sink))
            self.tasks[request.request_id, index] = task

    def abort(self, request_id: str, index: int = -1) -> None:
        self.aborted.append((request_id, index))
        for key, task in self.tasks.items():
            if key[0] == request_id and index in (-1, key[1]):
                task.cancel()

    def die(self, reason: str) -> None:
        """Everything running hears of it."""
        self.dead = reason
        for task in self.tasks.values():
            task.cancel()
        for sink in self.sinks.values():
            sink(EngineDead(reason))

    async def write(self, request: Request, index: int, sink: Sink) -> None:
        params = request.params
        ids = [*self.reply.encode(), EOS]
        limit = params.max_tokens or len(ids)
        for position in range(limit):
            while (self.hold and position) or self.hold_first:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0)
            token = ids[position] if position < len(ids) else EOS
            output = Output(request_id=request.request_id, index=index, token_ids=[token])
            if position == 0:
                self.first(request, output)
            if params.logprobs is not None:
                output.logprobs = [row(token, params.logprobs)]
            if self.fail_after == position:
                output.token_ids, output.finish_reason = [], "error"
                output.message = "out of blocks"
            elif token == EOS and not params.ignore_eos:
                output.finish_reason = "stop"
            elif token in (params.stop_token_ids or ()):
                output.finish_reason, output.stop_reason = "stop", token
            elif position + 1 == limit:
                output.finish_reason = "length"
            sink(output)
            if output.finish_reason is not None:
                return

    def first(self, request: Request, output: Output) -> None:
        """What the first output tells."""
        output.num_prompt_tokens = len(request.prompt_token_ids)
        output.num_cached_tokens = min(2, output.num_prompt_tokens - 1)
        output.scheduled = request.arrival + 0.001
        top = request.params.prompt_logprobs
        if top is not None and output.index == 0:
            output.prompt_logprobs = [row(i, top) for i in request.prompt_token_ids[1:]]


def row(token: int, num_top: int) -> list[TokenLogprob]:
    """A drawn token of rank 2, and top ones."""
    return [(token, -1.5, 2), *((ord("a") + i, -0.5 - i, i + 1) for i in range(num_top))]


def served_model(**changes: Any) -> ServedModel:
    """The byte model, 64 KiB of context."""
    given: dict[str, Any] = {
        "names": ("fake", "org/fake"),
        "root": "nowhere",
        "max_model_len": 1000,
        "vocab_size": VOCAB,
        "max_num_seqs": 64,
        "tokenizer": ByteTokenizer(),
        "chat_template": PlainTemplate(),
        "eos_token_ids": (EOS,),
    }
    return ServedModel(**(given | changes))
