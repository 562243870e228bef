"""Mixtures of experts, pointed at the one op ``fxlm::grouped_linear``.

The eager loop of Hugging Face experts asks which experts were hit, which no graph can
capture; the stock ``grouped_mm`` ends in an op that only exists where transformers is
imported. Ours sorts the (token, expert) pairs by expert, runs each projection as one grouped
matmul, and sums the pairs of a token. Not here: the router (model code, captured as it is).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxlm.models.attention import NAME


class Routing:
    """(token, slot) pairs sorted by expert, for matmuls over groups of rows.

    Attributes:
        order: int64 [T*k]; which pair stands at each sorted place.
        ids: expert of each sorted place; pairs of no expert (id >= num_experts) come last.
        offsets: int32 [E]; end of each expert's places.
    """

    def __init__(self, top_k_index: torch.Tensor, num_experts: int) -> None:
        """Sort ``top_k_index``: int64 [T, k]."""
        self.tokens, self.slots = top_k_index.shape
        flat = top_k_index.reshape(-1)
        self.order = torch.argsort(flat, stable=True)
        self.ids = flat[self.order]
        groups = torch.arange(num_experts, device=flat.device)
        self.offsets = (self.ids[None, :] <= groups[:, None]).sum(1, dtype=torch.int32)

    def rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T*k, H], sorted."""
        return hidden[self.order // self.slots]

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[T*k, I] sorted, weight [E, O, I] -> [T*k, O]; rows of no expert give 0."""
        out: torch.Tensor = torch.ops.fxlm.grouped_linear(x.to(weight.dtype), weight, self.offsets)
        return out

    def combine(self, x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """[T*k, H] sorted, times weights [T, k], summed over the slots of each token: [T, H]."""
        if weights is not None:
            x = x * weights.reshape(-1)[self.order].unsqueeze(-1)
        return x[torch.argsort(self.order)].view(self.tokens, self.slots, x.shape[-1]).sum(1)


def _project(module: Any, name: str, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    weight: torch.Tensor = getattr(module, name)
    x = routing.linear(x, weight.transpose(1, 2) if module.is_transposed else weight)
    if module.has_bias:
        x = x + getattr(module, f"{name}_bias")[routing.ids.clamp(max=weight.shape[0] - 1)]
    return x


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
    routing = Routing(top_k_index, module.num_experts)
    up = "gate_up_proj" if module.has_gate else "up_proj"
    x = _project(module, up, routing.rows(hidden), routing)
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = _project(module, "down_proj", x, routing)
    if getattr(module, "has_post_expert_norm", False):
        x = module.post_expert_norm(x)
    return routing.combine(x, top_k_weights).to(hidden.dtype)


def _dbrx(self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Any:
    shape = (self.num_experts, self.ffn_hidden_size, self.hidden_size)
    w1, v1, w2 = (weight.view(shape) for weight in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
    routing = Routing(index, self.num_experts)
    x = routing.rows(hidden.reshape(-1, self.hidden_size))
    x = self.mlp.activation_fn(routing.linear(x, w1)) * routing.linear(x, v1)
    x = routing.combine(routing.linear(x, w2.transpose(1, 2)), weights)
    return x.to(hidden.dtype).view(hidden.shape)


def _longcat(self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Any:
    """Experts from ``num_routed_experts`` on are the identity."""
    routing = Routing(index, self.num_routed_experts)
    gate_up = self.gate_up_proj[: self.num_routed_experts]
    gate, up = routing.linear(routing.rows(hidden), gate_up).chunk(2, dim=-1)
    x = routing.combine(routing.linear(self.act_fn(gate) * up, self.down_proj), weights)
    kept = (weights * (index >= self.num_routed_experts)).sum(-1, keepdim=True)
    return (x + kept * hidden).to(hidden.dtype)


def _llama4(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights scale what goes into an expert, not what comes out."""
    hidden = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(hidden)
    weights, index = scores.topk(self.top_k, dim=1)
    routing = Routing(index, self.num_experts)
    x = routing.rows(hidden) * weights.reshape(-1)[routing.order].unsqueeze(-1)
    gate, up = routing.linear(x, self.experts.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
    x = routing.linear(up * self.experts.act_fn(gate), self.experts.down_proj.transpose(1, 2))
    return self.shared_expert(hidden) + routing.combine(x, None).to(hidden.dtype), logits


def _jetmoe_gating(self: Any, hidden_states: torch.Tensor) -> tuple[Any, ...]:
    """As the original, with ends of groups as a tensor where it has sizes as a list."""
    logits = self.layer(hidden_states).float()
    best, index = logits.topk(self.top_k, dim=1)
    weights = torch.softmax(best, dim=1).type_as(hidden_states)
    routing = Routing(index, self.num_experts)
    gates = weights.reshape(-1)[routing.order]
    return routing.order, routing.order // self.top_k, gates, routing.offsets, logits


def _jetmoe(self: Any, inputs: torch.Tensor, offsets: torch.Tensor) -> Any:
    return torch.ops.fxlm.grouped_linear(inputs, self.weight, offsets)


# Families whose experts loop by hand: class -> forward.
FORWARDS: dict[str, Callable[..., Any]] = {
    "DbrxExperts": _dbrx,
    "JetMoeParallelExperts": _jetmoe,
    "JetMoeTopKGating": _jetmoe_gating,
    "LongcatFlashExperts": _longcat,
    "Llama4TextMoe": _llama4,
}


def register() -> None:
    """Register the experts function with transformers, and load its op."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    import fxlm.compiler.ops.grouped  # noqa: F401  defines the op

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts)
