"""Passes as the runtime would choose them: with options, or a whole column."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fxlm.compiler.pipeline import GraphPass
from fxlm.passes.column import COLUMN


def with_options(item: GraphPass, **options: Any) -> GraphPass:
    """The pass, run with these keyword arguments."""
    return replace(item, options=options)


# Passes that run only when they are asked for, with options of their own.
ASKED_FOR = ("bind_checkpoint", "cut_stages", "quantize", "shard", "steer", "tap", "verify")


def plain_column() -> list[GraphPass]:
    """The passes that run for every model once its weights are bound."""
    return [item for item in COLUMN if item.name not in ASKED_FOR]
