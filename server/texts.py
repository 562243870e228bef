"""Single tokens as text and bytes, for logprobs.

Here: a cache over the tokenizer and the three shapes of logprobs. Not here: the text of an answer
(`fxlm.runtime.outputs`).
"""

from collections.abc import Sequence

from fxlm.runtime.messages import TokenLogprob
from fxlm.server.replies import (
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprobs,
    TopLogprob,
)
from fxlm.server.served import Tokenizer

# -inf is no JSON; this is what OpenAI and vLLM send for "impossible".
LOWEST = -9999.0


def finite(logprob: float) -> float:
    """A log-probability that JSON can carry (NaN counts as impossible)."""
    return logprob if logprob >= LOWEST else LOWEST


class TokenTexts:
    """Text and bytes of single tokens, remembered."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, tuple[str, bytes]] = {}

    def token(self, token_id: int) -> tuple[str, bytes]:
        """Text (half characters show as U+FFFD) and bytes of a token."""
        found = self.known.get(token_id)
        if found is None:
            raw = self.tokenizer.token_bytes(token_id)
            found = self.known[token_id] = (raw.decode("utf-8", "replace"), raw)
        return found

    def chat_logprobs(
        self, rows: Sequence[Sequence[TokenLogprob]], num_top: int
    ) -> list[TokenLogprobs]:
        """OpenAI's chat form; a row is the drawn token, then the top ones."""
        return [
            TokenLogprobs(
                token=self.token(row[0][0])[0],
                logprob=finite(row[0][1]),
                bytes=list(self.token(row[0][0])[1]),
                top_logprobs=[self.top(entry) for entry in row[1 : 1 + num_top]],
            )
            for row in rows
        ]

    def top(self, entry: TokenLogprob) -> TopLogprob:
        """One alternative."""
        text, raw = self.token(entry[0])
        return TopLogprob(token=text, logprob=finite(entry[1]), bytes=list(raw))

    def completion_logprobs(
        self,
        token_ids: Sequence[int],
        rows: Sequence[Sequence[TokenLogprob] | None],
        num_top: int,
        offset: int,
    ) -> CompletionLogprobs:
        """The completions form; `offset` is the number of characters before the first token."""
        made = CompletionLogprobs()
        for token_id, row in zip(token_ids, rows, strict=True):
            text = self.token(token_id)[0]
            made.text_offset.append(offset)
            made.tokens.append(text)
            made.token_logprobs.append(finite(row[0][1]) if row else None)
            made.top_logprobs.append(self.top_dict(row, num_top) if row else None)
            offset += len(text)
        return made

    def top_dict(self, row: Sequence[TokenLogprob], num_top: int) -> dict[str, float]:
        """The drawn token and the top ones; the first of two that look alike is kept."""
        found: dict[str, float] = {}
        for token_id, logprob, _ in (*row[1 : 1 + num_top], row[0]):
            found.setdefault(self.token(token_id)[0], finite(logprob))
        return found

    def prompt_logprobs(self, rows: Sequence[Sequence[TokenLogprob]]) -> PromptLogprobs:
        """vLLM's form: a dict for each prompt token, none for the first."""
        made: PromptLogprobs = [None]
        for row in rows:
            made.append(
                {
                    str(token_id): PromptLogprob(
                        logprob=finite(logprob), rank=rank, decoded_token=self.token(token_id)[0]
                    )
                    for token_id, logprob, rank in reversed(row)
                }
            )
        return made
