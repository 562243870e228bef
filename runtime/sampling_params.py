"""How to draw tokens for one request: vLLM's names, defaults and bounds.

Here: the options a client may set, their normal form and their check.
Not here: drawing itself (the ``sample`` op) and stop strings (``outputs``).
"""

import math

import msgspec

from fxlm.compiler.errors import InvalidRequest

MAX_LOGPROBS = 20  # columns of the step's logprob outputs, the drawn token's not counted
MAX_N = 16384
MIN_TEMPERATURE = 0.01  # smaller ones divide logits into infinities; vLLM raises them likewise
MAX_BIAS = 100.0

MAX_REPETITION_PENALTY = 1e6  # float32 is what the sampler computes in


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Options of one request.

    Args:
        n: completions to draw from the same prompt.
        presence_penalty: taken from the logit of each token already in the output; [-2, 2].
        frequency_penalty: the same, times its number of occurrences; [-2, 2].
        repetition_penalty: divides (positive) or multiplies (negative) the logits of tokens of
            the prompt and the output; > 0, 1 is off.
        temperature: 0 is greedy; [0, 2].
        top_p: smallest set of tokens with this probability mass; (0, 1].
        top_k: number of most likely tokens kept; 0 or -1 is off.
        min_p: least probability relative to the most likely token; [0, 1].
        seed: makes draws repeatable; None or -1 is a random one.
        stop: a string or strings that end the text (``outputs`` looks for them).
        stop_token_ids: tokens that end the output.
        ignore_eos: go on after the end-of-sequence token.
        max_tokens: most tokens to generate; None is up to the context.
        min_tokens: end and stop tokens cannot be drawn before that many.
        logprobs: top log-probabilities to return per output token, 0..20.
        prompt_logprobs: the same for each token of the prompt.
        taps: points whose hidden states to return (`--tap`), a row a token.
        tap_prompt: begin with the first token of the prompt, not the last.
        steer: vectors to add to the hidden states of points (`--steer`), by point.
        detokenize: False leaves the text empty.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string (or token) in the text.
        logit_bias: token id -> number added to its logit, clamped to [-100, 100].
        allowed_token_ids: not served yet.
        bad_words: not served yet.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    taps: list[str] | None = None
    tap_prompt: bool = False
    steer: dict[str, list[float]] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None

    def __post_init__(self) -> None:
        """Bring equal meanings to one form; what is wrong is left for `verify` to name."""
        if isinstance(self.stop, str):
            _force(self, "stop", [self.stop])
        if self.seed == -1:
            _force(self, "seed", None)
        if self.top_k == -1:
            _force(self, "top_k", 0)
        if isinstance(self.temperature, float) and 0.0 < self.temperature < MIN_TEMPERATURE:
            _force(self, "temperature", MIN_TEMPERATURE)

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list, whatever form the user chose."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether draws depend on how often tokens occurred before."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def verify(self, vocab_size: int, max_model_len: int) -> None:
        """Check every bound.

        Args:
            vocab_size: token ids must be below it.
            max_model_len: context of the model in tokens; ``min_tokens`` must be below it.

        Raises:
            InvalidRequest: its ``param`` is the first field found wrong.
        """
        self._verify_types()
        self._verify_numbers()
        self._verify_lengths(max_model_len)
        self._verify_stops(vocab_size)
        self._verify_bias(vocab_size)

    def _verify_types(self) -> None:
        try:
            msgspec.convert(msgspec.structs.asdict(self), SamplingParams)
        except msgspec.ValidationError as error:
            text = str(error)
            field = text.partition("$.")[2].partition("[")[0].strip("`")
            raise InvalidRequest(f"{field}: {text}", field or None) from error

    def _verify_numbers(self) -> None:
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("min_p", self.min_p, 0.0, 1.0)
        if not 0.0 < self.repetition_penalty <= MAX_REPETITION_PENALTY:
            remedy = f"it must be above 0 and at most {MAX_REPETITION_PENALTY:g}"
            _refuse("repetition_penalty", self.repetition_penalty, remedy)
        if not 0.0 < self.top_p <= 1.0:
            _refuse("top_p", self.top_p, "it must be in (0, 1]")
        if self.top_k < 0:
            _refuse("top_k", self.top_k, "it must be at least 1, or 0 or -1 for all tokens")
        if self.top_k >= 2**31:
            _refuse("top_k", self.top_k, "it must be below 2**31")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            _refuse("seed", self.seed, "it must fit 64 bits")

    def _verify_lengths(self, max_model_len: int) -> None:
        if not 1 <= self.n <= MAX_N:
            _refuse("n", self.n, f"it must be in 1..{MAX_N}")
        if self.n > 1 and self.is_greedy:
            _refuse("n", self.n, "it must be 1 when temperature is 0: all would be the same")
        if self.max_tokens is not None and self.max_tokens < 1:
            _refuse("max_tokens", self.max_tokens, "it must be at least 1")
        if self.min_tokens < 0:
            _refuse("min_tokens", self.min_tokens, "it must be at least 0")
        limit = max_model_len if self.max_tokens is None else self.max_tokens
        if self.min_tokens > limit:
            _refuse("min_tokens", self.min_tokens, f"it must be at most max_tokens, {limit}")
        asked = {"logprobs": self.logprobs, "prompt_logprobs": self.prompt_logprobs}
        for field, value in asked.items():
            if value is not None and not 0 <= value <= MAX_LOGPROBS:
                _refuse(field, value, f"it must be in 0..{MAX_LOGPROBS}")
        if self.tap_prompt and not self.taps:
            _refuse("tap_prompt", True, "it needs taps: name points there, or leave it out")

    def _verify_stops(self, vocab_size: int) -> None:
        for text in self.stop_strings:
            if not text:
                _refuse("stop", text, "a stop string cannot be empty")
        if self.stop_strings and not self.detokenize:
            _refuse("stop", self.stop, "stop strings need detokenize=True")
        for token in self.stop_token_ids or ():
            _token("stop_token_ids", token, vocab_size)

    def _verify_bias(self, vocab_size: int) -> None:
        for token, bias in (self.logit_bias or {}).items():
            _token("logit_bias", token, vocab_size)
            if math.isnan(bias):
                _refuse("logit_bias", bias, "a bias must be a number")
        if self.allowed_token_ids is not None:
            _refuse("allowed_token_ids", "...", "it is not served yet; leave it out")
        if self.bad_words:
            _refuse("bad_words", self.bad_words, "it is not served yet; leave it out")


def _force(params: SamplingParams, field: str, value: object) -> None:
    msgspec.structs.force_setattr(params, field, value)


def _refuse(field: str, value: object, remedy: str) -> None:
    raise InvalidRequest(f"{field}={value!r} cannot be used: {remedy}", field)


def _within(field: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # false for NaN too
        _refuse(field, value, f"it must be in [{low:g}, {high:g}]")


def _token(field: str, token: int, vocab_size: int) -> None:
    if not 0 <= token < vocab_size:
        _refuse(field, token, f"token ids go from 0 to {vocab_size - 1}")
