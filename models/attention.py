"""Attention of Hugging Face models, pointed at the one op ``fxlm::attention``.

Transformers lets an attention function and a mask function be registered under a name. Ours
is ``fxlm``. The mask function builds no tensor: it reads which pattern the model asked for
(full, sliding window, chunks) from the mask closures and hands on a tag; the attention
function turns tag and keyword arguments into the op's arguments, or refuses the model. What
the mask says is the truth (as it is for ``eager`` and ``sdpa``); a ``sliding_window`` keyword
without a mask, or a pattern the op cannot express, is refused and never guessed.

Layers are numbered in the order of their calls (`restart_numbering` at every forward), so
that a module called twice gets two caches. Not here: the op (`fxlm.compiler.ops`), experts
(`fxlm.models.experts`), attention written by hand inside a model (`fxlm.models.adapters`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxlm.compiler.errors import UnsupportedModel

NAME = "fxlm"

# Keyword arguments of attention functions that change nothing for one causal ragged step:
# training, bookkeeping and lengths that fxlm passes in its own way.
_INERT = frozenset(
    {
        "attention_mask_type", "cache", "cache_position", "cu_seq_lens_k", "cu_seq_lens_q",
        "deterministic", "logits_to_keep", "max_length_k", "max_length_q",
        "num_items_in_batch", "output_attentions", "output_hidden_states",
        "output_router_logits", "past_key_values", "position_embeddings", "position_ids",
        "return_dict", "target_dtype", "use_cache",
    }
)  # fmt: skip

_calls = threading.local()


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskTag:
    """Stands where a model expects its attention mask.

    Attributes:
        window: tokens a query sees, itself included (0: all before it).
        chunk: size of the chunks attention stays within (0: none).
        reason: why the pattern cannot be expressed ('' if it can).
    """

    window: int = 0
    chunk: int = 0
    reason: str = ""

    ndim = 4  # model code asks this to tell a finished mask from a padding mask

    def __getitem__(self, index: object) -> MaskTag:
        return self

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedModel(
            f"the model computes with its attention mask (.{name}): it attends, or chooses what to "
            "attend to, in code of its own"
        )

    def __radd__(self, scores: object) -> NoReturn:
        raise UnsupportedModel(
            "the model adds its attention mask to scores: it attends in code of its own"
        )

    __add__ = __radd__

    def to(self, *args: object, **kwargs: object) -> MaskTag:
        return self

    def clone(self) -> MaskTag:
        return self

    def contiguous(self) -> MaskTag:
        return self

    def float(self) -> MaskTag:
        return self


def _closure(function: Callable[..., Any], name: str) -> Any:
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return cells[name].cell_contents


def classify(function: Callable[..., Any]) -> MaskTag:
    """Read the pattern of a mask closure of ``transformers.masking_utils``.

    Returns:
        A tag; its ``reason`` is set where the pattern is not causal or not known.
    """
    name = getattr(function, "__qualname__", repr(function))
    if name == "causal_mask_function":
        return MaskTag()
    if name.startswith("and_masks."):
        return _intersection(_closure(function, "mask_functions"))
    if name.startswith("sliding_window_overlay."):
        return MaskTag(window=int(_closure(function, "sliding_window")))
    if name.startswith("chunked_overlay."):
        return MaskTag(chunk=int(_closure(function, "chunk_size")))
    if name.startswith("packed_sequence_mask_function."):
        return MaskTag()  # sequences of a step never see each other
    if name.startswith(("remap_positions_for_packed_sequence.", "add_offsets_to_mask_function.")):
        return classify(_closure(function, "mask_function"))
    if name.startswith("or_masks."):
        return _union(_closure(function, "mask_functions"))
    return MaskTag(reason=f"its attention mask is not causal or not known: {name}")


def _intersection(functions: tuple[Callable[..., Any], ...]) -> MaskTag:
    tags = [classify(function) for function in functions]
    windows = [tag.window for tag in tags if tag.window]
    chunks = {tag.chunk for tag in tags if tag.chunk}
    reason = next((tag.reason for tag in tags if tag.reason), "")
    if len(chunks) > 1:
        reason = f"its attention mask joins several chunk sizes: {sorted(chunks)}"
    return MaskTag(window=min(windows, default=0), chunk=max(chunks, default=0), reason=reason)


def _union(functions: tuple[Callable[..., Any], ...]) -> MaskTag:
    """Blocks that see themselves whole are images; fxlm gives text alone, so there are none."""
    rest = [f for f in functions if not f.__qualname__.startswith("blockwise_overlay.")]
    if len(rest) == 1:
        return classify(rest[0])
    return MaskTag(reason=f"its attention mask is a union: {[f.__qualname__ for f in functions]}")


def mask(*args: Any, mask_function: Callable[..., Any], **kwargs: Any) -> MaskTag:
    """Mask function registered under ``fxlm``; builds a tag in place of a tensor."""
    del args, kwargs
    return classify(mask_function)


def restart_numbering() -> None:
    """Number the next attention call 0; called at the start of every forward."""
    _calls.count = 0


def _next_layer() -> int:
    layer = int(getattr(_calls, "count", 0))
    _calls.count = layer + 1
    return layer


def _refuse(module: nn.Module, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"{type(module).__name__} cannot be served: {reason}")


def pattern(module: nn.Module, tag: object, is_causal: bool | None, window: int | None) -> MaskTag:
    """Decide the pattern of one call from what the module was given as mask, or refuse it."""
    if isinstance(tag, MaskTag):
        if tag.reason:
            raise _refuse(module, tag.reason)
        return tag
    if tag is not None:
        raise _refuse(module, f"it makes a mask of its own ({type(tag).__name__})")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        raise _refuse(module, "its attention is bidirectional (is_causal is False)")
    if window:
        raise _refuse(module, f"it passes sliding_window={window} without a mask saying so")
    return MaskTag()


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    window: int = 0,
    chunk: int = 0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Emit the op for one layer: q [1,Hq,T,Dk], k [1,Hkv,T,Dk], v [1,Hkv,T,Dv] -> [1,T,Hq,Dv]."""
    if not statically_known_true(query.shape[2] == key.shape[2]):
        raise _refuse(module, f"{key.shape[2]} keys for {query.shape[2]} queries")
    if query.shape[1] % key.shape[1]:
        raise _refuse(module, f"{query.shape[1]} query heads over {key.shape[1]} key heads")
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    out: torch.Tensor = torch.ops.fxlm.attention(
        query, key, value, _next_layer(), scale, window, chunk, float(softcap or 0.0), sinks, slopes
    )
    return out


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention function registered under ``fxlm``.

    Returns:
        (output [1, T, Hq, Dv], None).

    Raises:
        UnsupportedModel: the pattern or a keyword argument has no meaning in the op.
    """
    unknown = sorted(
        name
        for name, value_ in kwargs.items()
        if name not in _INERT and value_ is not None and value_ is not False
    )
    if unknown:
        raise _refuse(module, f"its attention takes {', '.join(unknown)}, which fxlm has not")
    if dropout and module.training:
        raise _refuse(module, "it is in training mode")
    tag = pattern(module, attention_mask, is_causal, sliding_window)
    out = attend(
        module, query, key, value, scale=scaling, window=tag.window, chunk=tag.chunk,
        softcap=softcap, sinks=s_aux,
    )  # fmt: skip
    return out, None


def register() -> None:
    """Register attention and mask functions with transformers, and load the ops."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from fxlm.compiler import ops

    ops.load()
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
