"""One request as the engine gets it: token ids and options, no text.

Not here: its state while running (``sequence``), its text (``outputs``).
"""

import msgspec

from fxlm.compiler.errors import InvalidRequest
from fxlm.runtime.sampling_params import SamplingParams


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What to generate.

    Args:
        request_id: unique among the unfinished requests.
        prompt_token_ids: at least one token; shorter than the context.
        params: how to draw.
        eos_token_ids: tokens that end the output unless ``params.ignore_eos``; the first is the
            tokenizer's own, the others come from the generation config.
        arrival: ``time.monotonic()`` seconds when it came in.
        priority: lower goes first; used with the ``priority`` policy only.
        cache_salt: requests share cached prefixes only if their salts are equal.
        num_together: requests that were asked for together; they share the bound on taps.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams = msgspec.field(default_factory=SamplingParams)
    eos_token_ids: list[int] = msgspec.field(default_factory=list)
    arrival: float = 0.0
    priority: int = 0
    cache_salt: str = ""
    num_together: int = 1

    def verify(self, vocab_size: int, max_model_len: int) -> None:
        """Check the prompt and the options.

        Raises:
            InvalidRequest: with the field at fault.
        """
        count = len(self.prompt_token_ids)
        if count == 0:
            raise InvalidRequest("the prompt is empty: give at least one token", "prompt")
        if count >= max_model_len:
            raise InvalidRequest(
                f"the prompt has {count} tokens and the context of this model is {max_model_len}"
                " tokens, of which at least one must be left for the output: shorten the prompt",
                "prompt",
            )
        low, high = min(self.prompt_token_ids), max(self.prompt_token_ids)
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise InvalidRequest(
                f"token id {bad} of the prompt is outside the vocabulary, 0..{vocab_size - 1}",
                "prompt",
            )
        self.params.verify(vocab_size, max_model_len)
