"""fxlm: an LLM inference engine in which the compiler is the product.

``LLM``, ``SamplingParams``, ``graph_pass`` and ``compile`` are imported when they are first
used, so that ``import fxlm`` is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxlm.runtime import spins as _spins

_spins.choose()

if TYPE_CHECKING:
    from fxlm.compiler.pipeline import graph_pass
    from fxlm.runtime.compile import compile
    from fxlm.runtime.llm import LLM
    from fxlm.runtime.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__", "compile", "graph_pass"]

_PLACES = {
    "LLM": "fxlm.runtime.llm",
    "SamplingParams": "fxlm.runtime.sampling_params",
    "compile": "fxlm.runtime.compile",
    "graph_pass": "fxlm.compiler.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'fxlm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PLACES[name]), name)
