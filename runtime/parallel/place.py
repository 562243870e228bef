"""Where a rank stands: which part of each layer it has, and which layers.

Here: the numbering of ranks. Ranks of one stage are neighbours: they talk most.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxlm.compiler.errors import InvalidOption
from fxlm.runtime.options import EngineOptions

# What one rank alone can do, and the value that asks for nothing of it.
_ALONE = {
    "tap": (),
    "steer": (),
    "speculative_config": None,
    "frozen": None,
    "tiered_start": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One rank among all.

    Attributes:
        rank: of all, from 0; rank 0 is the engine's.
        tensor_size: ranks that share each layer.
        stages: parts that the layers are cut into.
    """

    rank: int = 0
    tensor_size: int = 1
    stages: int = 1

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.tensor_size * self.stages

    @property
    def tensor_rank(self) -> int:
        """Which part of its layers the rank has."""
        return self.rank % self.tensor_size

    @property
    def stage(self) -> int:
        """Which layers the rank has."""
        return self.rank // self.tensor_size

    @property
    def is_last(self) -> bool:
        """Whether its stage draws the tokens."""
        return self.stage == self.stages - 1

    @property
    def drawing(self) -> int:
        """The rank whose draws count."""
        return (self.stages - 1) * self.tensor_size


def place_of(options: EngineOptions, rank: int = 0) -> Place:
    """The place of a rank of an engine.

    Raises:
        InvalidOption: options that do not go together with several ranks.
    """
    place = Place(
        rank=rank, tensor_size=options.tensor_parallel_size, stages=options.pipeline_parallel_size
    )
    assert 0 <= rank < place.size, (rank, place.size)
    for name, unset in _ALONE.items():
        given = getattr(options, name)
        if place.size > 1 and given != unset:
            reason = "not over several ranks yet; leave it out, or use one rank"
            raise InvalidOption(name, getattr(given, "method", given), reason)
    return place
