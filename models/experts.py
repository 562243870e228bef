"""Mixtures of experts, pointed at the one op ``fxlm::grouped_linear``.

The eager loop of Hugging Face experts asks which experts were hit, which no graph can
capture; the stock ``grouped_mm`` ends in an op that only exists where transformers is
imported. Ours sorts the (token, expert) pairs by expert, runs each projection as one grouped
matmul, and sums the pairs of a token. Not here: the router (model code, captured as it is).
"""

from __future__ import annotations

from typing import Any

import torch

from fxlm.models.attention import NAME


def _project(
    module: Any, name: str, x: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    weight: torch.Tensor = getattr(module, name)
    if module.is_transposed:  # stored [E, I, O]
        weight = weight.transpose(1, 2)
    out: torch.Tensor = torch.ops.fxlm.grouped_linear(x.to(weight.dtype), weight, offsets)
    if module.has_bias:
        out = out + getattr(module, f"{name}_bias")[ids]
    return out


def experts(
    module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts function registered under ``fxlm``.

    Args:
        module: experts of transformers: 3D weights, ``has_gate``, ``is_transposed``...
        hidden: [T, H].
        top_k_index: int64 [T, k]; expert of each slot; the number of experts itself means none.
        top_k_weights: [T, k].

    Returns:
        [T, H] in the dtype of ``hidden``.
    """
    tokens, slots = top_k_index.shape
    flat = top_k_index.reshape(-1)
    order = torch.argsort(flat, stable=True)  # [T*k]
    ids = flat[order]
    groups = torch.arange(module.num_experts, device=flat.device)
    offsets = (ids[None, :] <= groups[:, None]).sum(1, dtype=torch.int32)  # [E], ends of groups
    up = "gate_up_proj" if module.has_gate else "up_proj"
    safe = ids.clamp(max=module.num_experts - 1) if module.has_bias else ids
    x = _project(module, up, hidden[order // slots], safe, offsets)
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = _project(module, "down_proj", x, safe, offsets)
    if getattr(module, "has_post_expert_norm", False):
        x = module.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    x = x[torch.argsort(order)].view(tokens, slots, hidden.shape[-1])
    return x.sum(1).to(hidden.dtype)


def register() -> None:
    """Register the experts function with transformers, and load its op."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    import fxlm.compiler.ops.grouped  # noqa: F401  defines the op

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts)
