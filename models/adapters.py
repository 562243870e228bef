"""What single model families need before they can be captured."""

from __future__ import annotations

from torch import nn


def adapt(model: nn.Module) -> None:
    """Adapt the modules of ``model`` in place."""
