"""Rotary scalings that follow the length while running, fixed to the served context.

Transformers recomputes the frequencies of ``longrope`` and ``dynamic`` rotations from the
longest position of a forward. A step of ours holds many sequences, and one must not turn the
keys of another (nor its own earlier ones, already in the cache). So the length is taken once:
the context that is served, for all sequences, as vLLM does. Not here: scalings that do not
depend on the length (``llama3``, ``yarn``, ``linear``), which need nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_FOLLOWS = ("longrope", "dynamic")
FIXED = "fixed"  # a type that transformers' update function leaves alone


def follows_length(config: Mapping[str, Any]) -> bool:
    """Whether a raw config names a rotation whose frequencies depend on the context."""
    text = json.dumps(config)
    return any(f'"{name}"' in text for name in (*_FOLLOWS, "su"))


def fix_lengths(model: nn.Module, max_model_len: int) -> int:
    """Fix every such rotation of ``model`` in place; returns how many.

    Args:
        model: built, with real buffers.
        max_model_len: context that will be served, in tokens.
    """
    return sum(
        _fix(module, prefix, layer_type, kind, max_model_len)
        for module in model.modules()
        for prefix, layer_type, kind in _rotations(module)
    )


def _rotations(module: nn.Module) -> Iterator[tuple[str, str | None, str]]:
    """Buffer prefix, layer type and kind of each rotation of a rotary module."""
    kinds: Any = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        yield "", None, kinds
    elif isinstance(kinds, dict):
        for layer_type, kind in list(kinds.items()):
            yield f"{layer_type}_", layer_type, kind


def _fix(module: Any, prefix: str, layer_type: str | None, kind: str, max_model_len: int) -> bool:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if not any(name in kind for name in _FOLLOWS) or f"{prefix}inv_freq" not in module._buffers:
        return False
    more = {} if layer_type is None else {"layer_type": layer_type}
    buffer = module._buffers[f"{prefix}inv_freq"]
    init = ROPE_INIT_FUNCTIONS[kind]
    values, _ = init(module.config, buffer.device, seq_len=max_model_len, **more)
    module._buffers[f"{prefix}inv_freq"] = values.to(buffer.dtype)
    if layer_type is None:
        module.rope_type = FIXED
    else:
        module.rope_type = {**module.rope_type, layer_type: FIXED}
    return True
