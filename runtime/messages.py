"""What crosses the wire between the engine process and its client: msgpack, typed by msgspec.

Here: the messages and their encoding. Not here: sockets (``service``, ``client``). A message is
data only; nothing in it can name code, and a malformed one raises `msgspec.DecodeError`.
"""

from typing import Literal

import msgspec

from fxlm.runtime.request import Request

FinishReason = Literal["stop", "length", "abort", "error"]
TokenLogprob = tuple[int, float, int]  # token id, log-probability, rank (1 = most likely)

# Upper bounds (tokens of one step) of the iteration-size histogram; the last bucket is open.
ITERATION_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Tapped(msgspec.Struct):
    """Rows of a tap: float32, little endian, of this shape."""

    shape: list[int]
    data: bytes

    def followed_by(self, later: "Tapped") -> "Tapped":
        """Both, one after the other."""
        shape = [self.shape[0] + later.shape[0], *self.shape[1:]]
        return Tapped(shape, self.data + later.data)


Taps = dict[str, Tapped]


def joined(taps: Taps | None, later: Taps | None) -> Taps | None:
    """The rows of each point, those of ``later`` behind; None where there are none."""
    if not taps or not later:
        return taps or later
    return {name: taps[name].followed_by(rows) for name, rows in later.items()}


class Output(msgspec.Struct, kw_only=True, omit_defaults=True):
    """News of one completion of one request.

    Args:
        index: completion, 0..n-1.
        token_ids: tokens drawn since the last `Output`.
        logprobs: per token of ``token_ids``, the drawn token first, then the top ones; None when
            not asked for.
        prompt_logprobs: once, with index 0: per prompt token from the second on, the prompt
            token first, then the top ones.
        taps: rows of each tapped point that came since the last `Output`.
        finish_reason: None while it goes on.
        stop_reason: the stop token's id; None for the end-of-sequence token.
        message: what went wrong, when ``finish_reason`` is "error".
        num_cached_tokens: prompt tokens found in the prefix cache.
        scheduled: ``time.monotonic()`` when it was first given blocks (0: never); sent with the
            first and the last token.
    """

    request_id: str
    index: int = 0
    token_ids: list[int] = msgspec.field(default_factory=list)
    logprobs: list[list[TokenLogprob]] | None = None
    prompt_logprobs: list[list[TokenLogprob]] | None = None
    taps: Taps | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    message: str = ""
    num_cached_tokens: int = 0
    num_prompt_tokens: int = 0
    num_preemptions: int = 0
    scheduled: float = 0.0


class EngineInfo(msgspec.Struct, kw_only=True):
    """What a client must know of a started engine."""

    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    block_size: int
    pid: int = 0
    details: dict[str, str] = msgspec.field(default_factory=dict)


# --- to the engine


class Submit(msgspec.Struct, tag=True):
    request: Request


class Abort(msgspec.Struct, tag=True):
    """Stop one completion, or all of the request (index -1), and free its blocks."""

    request_id: str
    index: int = -1


class Ping(msgspec.Struct, tag=True):
    nonce: int = 0


class Shutdown(msgspec.Struct, tag=True):
    """Refuse new requests, finish the others within ``deadline_s`` seconds, then leave."""

    deadline_s: float = 0.0


# --- from the engine


class Ready(msgspec.Struct, tag=True):
    info: EngineInfo


class Tokens(msgspec.Struct, tag=True):
    """Everything one step brought."""

    outputs: list[Output]


class Failed(msgspec.Struct, tag=True):
    """A request that was refused, or (``request_id`` None) the end of the engine."""

    request_id: str | None
    message: str
    param: str | None = None


class Stats(msgspec.Struct, tag=True, kw_only=True):
    """Numbers for metrics. Totals count since the start; the rest is of this moment.

    Args:
        kv_cache_usage: share of the blocks in use by sequences, 0..1.
        finished: completions by finish reason, total.
        prefix_queries: prompt tokens looked up in the prefix cache, total.
        prefix_hits: of them, found.
        iteration_tokens: tokens of the steps by `ITERATION_BUCKETS` (not cumulative), total.
        num_drafts: drafts verified, one a sequence and step, total.
        num_draft_tokens: tokens in them, total.
        num_accepted_tokens: of these, accepted, total.
        accepted_per_position: accepted tokens by place in their draft; empty: nothing is drafted.
        num_messages_bad: messages that could not be read, total.
        num_polls: times the service loop looked for messages, total.
        tier: what runs the steps, ``compiled`` or ``interpreted``.
        startup: seconds from the start of the engine's process to its being ready, by phase.
        artifact: ``hit`` if the cache had the artifact, else why not: ``absent``, ``damaged`` or
            ``changed``.
        weights: of prepared weights that are mapped: ``unchecked``, ``whole`` or ``damaged``.
        passes: of the compilation that made the artifact, by name: rewrites and seconds.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_steps: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    finished: dict[str, int] = msgspec.field(default_factory=dict)
    iteration_tokens: list[int] = msgspec.field(default_factory=list)
    iteration_tokens_sum: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: list[int] = msgspec.field(default_factory=list)
    num_messages_bad: int = 0
    num_polls: int = 0
    tier: str = ""
    startup: dict[str, float] = msgspec.field(default_factory=dict)
    artifact: str = ""
    weights: str = ""
    passes: dict[str, tuple[int, float]] = msgspec.field(default_factory=dict)


class Pong(msgspec.Struct, tag=True):
    nonce: int
    stats: Stats


ToEngine = Submit | Abort | Ping | Shutdown
FromEngine = Ready | Tokens | Failed | Pong | Stats

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """One frame."""
    return _encoder.encode(message)


def decode_to_engine(frame: bytes) -> ToEngine:
    """Raises `msgspec.DecodeError` (`ValidationError` is one) for anything else."""
    return _to_engine.decode(frame)


def decode_from_engine(frame: bytes) -> FromEngine:
    """Raises `msgspec.DecodeError` for anything else."""
    return _from_engine.decode(frame)
