"""What a drafter is to the engine.

Here: the `Drafter` base class. Not here: drafters (one file each beside this one), when and how
much is drafted (``speculator``), whether a guess was right (the graph, see `fxlm.passes.verify`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from fxlm.runtime.sequence import Sequence


class Drafter(ABC):
    """Guesses tokens; a wrong guess costs time and never changes what is generated.

    A class of a user (``"method": "custom_class"``) is called with `SpeculativeConfig` and
    `WorkerSpec`, and may derive from this one or only look like it.
    """

    name: str = ""  # in warnings; the class's own if empty

    @abstractmethod
    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[list[int]]:
        """Guess the next tokens of several sequences.

        Args:
            sequences: each wants its next token; ``token_ids`` is prompt and output. To be read
                only.
            limits: most tokens wanted of each, at least 1.

        Returns:
            Tokens for each sequence, in order; none where there is no guess.
        """

    def finish(self, sequence: Sequence) -> None:  # noqa: B027 - most have nothing to forget
        """A sequence ended; forget what was kept of it."""
