"""What single families need before they can be captured, a table and a few lines each.

Families that attend through transformers' attention interface, nearly all, need nothing.
These write their attention by hand, so their scores are pointed at the op here; or they count
positions for themselves and ignore ``position_ids``. Not here: anything else about a family.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fxlm.compiler.errors import UnsupportedModel
from fxlm.models import experts
from fxlm.models.attention import MaskTag, attend, pattern

_step = threading.local()


def adapt(model: nn.Module) -> None:
    """Adapt the modules of ``model`` in place (instances only, never classes)."""
    model.register_forward_pre_hook(_remember_positions, with_kwargs=True)
    for module in model.modules():
        name = type(module).__name__
        if _keeps_state(module):
            module.register_forward_pre_hook(_refuse_state)
        if not type(module).__module__.startswith("transformers.models."):
            continue  # code of a checkpoint may use the same names for something else
        if name in _FORWARDS:
            object.__setattr__(module, "forward", MethodType(_FORWARDS[name], module))
        if name in _SCORES and hasattr(module, "_attn"):
            object.__setattr__(module, "_attn", MethodType(_SCORES[name], module))
        if hasattr(module, "create_position_ids_from_input_ids") and hasattr(module, "padding_idx"):
            module.register_forward_pre_hook(_shift_positions, with_kwargs=True)


def _keeps_state(module: nn.Module) -> bool:
    """Whether a module carries something from token to token that is no attention."""
    if _STATEFUL.search(type(module).__name__):
        return True
    causal = [c for c in module.children() if isinstance(c, nn.Conv1d) and c.groups > 1]
    return any(conv.groups == conv.in_channels for conv in causal)


def _refuse_state(module: nn.Module, args: object) -> None:
    raise UnsupportedModel(
        f"{type(module).__name__} is recurrent or convolutional: it carries a state from token to "
        "token, and fxlm keeps states of attention alone"
    )


def open_tables(module: Any) -> None:
    """Let classes chosen from a table by the attention's name be found under ours."""
    for name, table in vars(module).items():
        if name.endswith("_ATTENTION_CLASSES") and isinstance(table, dict) and "eager" in table:
            table["fxlm"] = table["eager"]


def _remember_positions(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    _step.positions = kwargs.get("position_ids")


def _shift_positions(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """RoBERTa counts positions from padding_idx + 1 on."""
    if kwargs.get("position_ids") is not None:
        kwargs["position_ids"] = kwargs["position_ids"] + module.padding_idx + 1
    return args, kwargs


def _positions(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Embed the step's positions: [1, T, H]; these modules count from 0 for themselves."""
    assert _step.positions is not None, "position_ids must be given"
    return functional.embedding(_step.positions + getattr(self, "offset", 0), self.weight)


def _positions_flat(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """As `_positions`, [T, H]."""
    return functional.embedding(_step.positions[0], self.weight)


def _positions_table(self: Any, position_ids: torch.Tensor, *args: Any) -> torch.Tensor:
    """XGLM, whose table else grows with the number of tokens."""
    return functional.embedding(position_ids + self.offset, self.weights)


def _heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[1, T, H*D] -> [1, H, T, D]."""
    return x.view(1, x.shape[1], -1, head_dim).transpose(1, 2)


def _run(self: Any, q: Any, k: Any, v: Any, mask: object, **options: Any) -> torch.Tensor:
    """Attend under the pattern of ``mask`` and join heads: [1, T, H*D]."""
    tag = pattern(self, mask, None, None)
    window = options.pop("window", tag.window)
    q, k = q.to(v.dtype), k.to(v.dtype)
    return attend(self, q, k, v, window=window, chunk=tag.chunk, **options).flatten(2)


def alibi_slopes(num_heads: int) -> list[float]:
    """ALiBi slopes of BLOOM and Falcon (https://arxiv.org/abs/2108.12409), one a head."""
    power = 2 ** math.floor(math.log2(num_heads))
    base = 2 ** (-(2 ** -(math.log2(power) - 3)))
    slopes = [base**i for i in range(1, power + 1)]
    extra = 2 ** (-(2 ** -(math.log2(2 * power) - 3)))
    return slopes + [extra**i for i in range(1, 2 * (num_heads - power) + 1, 2)]


def mpt_slopes(num_heads: int, bias_max: float) -> list[float]:
    """ALiBi slopes of MPT, which reorders heads that are no power of two."""
    power = 2 ** math.ceil(math.log2(num_heads))
    slopes = [2 ** -(i * bias_max / power) for i in range(1, power + 1)]
    if power != num_heads:
        slopes = (slopes[1::2] + slopes[::2])[:num_heads]
    return slopes


def _falcon(
    self: Any,
    hidden_states: torch.Tensor,
    alibi: torch.Tensor | None,
    attention_mask: object,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    q, k, v = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
    slopes = None
    if alibi is None:
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    else:
        scaled = [slope * self.inv_norm_factor for slope in alibi_slopes(self.num_heads)]
        slopes = hidden_states.new_tensor(scaled, dtype=torch.float32)
    return self.dense(_run(self, q, k, v, attention_mask, slopes=slopes)), None


def _llama4(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: torch.Tensor,
    attention_mask: object = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Llama 4 scales queries of layers without rotation by their position."""
    from transformers.models.llama4.modeling_llama4 import apply_rotary_emb

    q, k, v = (
        project(hidden_states).view(1, hidden_states.shape[1], -1, self.head_dim)
        for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    if self.use_rope:
        q, k = apply_rotary_emb(q, k, position_embeddings)
    if hasattr(self, "qk_norm"):
        q, k = self.qk_norm(q), self.qk_norm(k)
    if self.attn_temperature_tuning and not self.use_rope:
        steps = torch.floor((_step.positions.float() + 1.0) / self.floor_scale)
        q = (q * (torch.log1p(steps) * self.attn_scale + 1.0)[..., None, None]).to(q.dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return self.o_proj(_run(self, q, k, v, attention_mask, scale=self.scaling)), None


def _bloom(
    self: Any,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    alibi: torch.Tensor,
    attention_mask: object,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    q, k, v = self._reshape(self.query_key_value(hidden_states))
    slopes = hidden_states.new_tensor(alibi_slopes(self.num_heads), dtype=torch.float32)
    return residual + self.dense(_run(self, q, k, v, attention_mask, slopes=slopes)), None


def _mpt(
    self: Any,
    hidden_states: torch.Tensor,
    position_bias: torch.Tensor,
    attention_mask: object = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    qkv = self.Wqkv(hidden_states)
    if self.clip_qkv:
        qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    q, k, v = (_heads(x, self.head_dim) for x in qkv.chunk(3, dim=2))
    slopes = hidden_states.new_tensor(mpt_slopes(self.n_heads, 8), dtype=torch.float32)
    out = _run(self, q, k, v, attention_mask, scale=self.softmax_scale, slopes=slopes)
    return self.out_proj(out), None


def _fairseq(
    self: Any,
    hidden_states: torch.Tensor,
    key_value_states: torch.Tensor | None = None,
    attention_mask: object = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    assert key_value_states is None, "a decoder alone has no cross attention"
    q, k, v = (
        _heads(project(hidden_states), self.head_dim)
        for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    return self.out_proj(_run(self, q, k, v, attention_mask, scale=self.scaling)), None


def _bert(
    self: Any,
    hidden_states: torch.Tensor,
    attention_mask: object = None,
    sinusoidal_pos: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    assert encoder_hidden_states is None, "a decoder alone has no cross attention"
    q, k, v = (
        _heads(project(hidden_states), self.attention_head_size)
        for project in (self.query, self.key, self.value)
    )
    if sinusoidal_pos is not None and self.rotary_value:
        q, k, v = self.apply_rotary_position_embeddings(sinusoidal_pos, q, k, v)
    elif sinusoidal_pos is not None:
        q, k = self.apply_rotary_position_embeddings(sinusoidal_pos, q, k)
    return _run(self, q, k, v, attention_mask), None


def _scores(
    self: Any, query: Any, key: Any, value: Any, attention_mask: object = None
) -> tuple[torch.Tensor, None]:
    """GPT-J, CodeGen, GPT-NeoX Japanese: q, k, v and the result [1, H, T, D]."""
    out = _run(self, query, key, value, attention_mask)
    return _heads(out, value.shape[-1]), None


def _gpt_neo_scores(
    self: Any, query: Any, key: Any, value: Any, attention_mask: object = None
) -> tuple[torch.Tensor, None]:
    window = self.config.window_size if self.attention_type == "local" else 0
    out = _run(self, query, key, value, attention_mask, scale=1.0, window=window)
    return _heads(out, value.shape[-1]), None


def _gpt_scores(
    self: Any, q: Any, k: Any, v: Any, attention_mask: object = None, output_attentions: Any = None
) -> list[torch.Tensor]:
    """GPT-1: k is [1, H, D, T]."""
    scale = None if self.scale else 1.0
    mask = attention_mask if isinstance(attention_mask, MaskTag) else None
    return [_heads(_run(self, q, k.transpose(2, 3), v, mask, scale=scale), v.shape[-1])]


_STATEFUL = re.compile(
    r"Mamba\w*(Mixer|Layer)|DeltaNet|LightningAttention|ShortConv|Rglru|^Rwkv\w*Attention|^xLSTMLayer"
)
_FAIRSEQ = ("MvpAttention", "TrOCRAttention", "XGLMAttention")
_BERT = tuple(
    f"{name}SelfAttention" for name in ("BigBird", "Git", "MegatronBert", "RemBert", "RoFormer")
)
# Position embeddings that count from 0 for themselves.
_COUNTING = (
    *(f"{name}LearnedPositionalEmbedding"
      for name in ("Bart", "BigBirdPegasus", "Blenderbot", "BlenderbotSmall", "MBart", "Mvp",
                   "PLBart", "TrOCR")),
    "MarianSinusoidalPositionalEmbedding",
    "PegasusSinusoidalPositionalEmbedding",
)  # fmt: skip
_FORWARDS: dict[str, Callable[..., Any]] = {
    **experts.FORWARDS,
    "XGLMSinusoidalPositionalEmbedding": _positions_table,
    "RoFormerSinusoidalPositionalEmbedding": _positions_flat,
    "FalconAttention": _falcon,
    "BloomAttention": _bloom,
    "Llama4TextAttention": _llama4,
    "MptAttention": _mpt,
    **dict.fromkeys(_FAIRSEQ, _fairseq),
    **dict.fromkeys(_BERT, _bert),
    **dict.fromkeys(_COUNTING, _positions),
}  # fmt: skip
_SCORES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("GPTJAttention", "CodeGenAttention", "GPTNeoXJapaneseAttention"), _scores),
    "GPTNeoSelfAttention": _gpt_neo_scores,
    "Attention": _gpt_scores,
}
