"""A pass with options, as the column hands them to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fxlm.compiler.pipeline import GraphPass


def with_options(item: GraphPass, **options: Any) -> GraphPass:
    """The pass, run with these keyword arguments."""
    return replace(item, options=options)
