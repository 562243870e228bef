"""The default column of passes: a line and a comment a pass, in the order in which they run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fxlm.compiler.pipeline import GraphPass
from fxlm.passes.bind_checkpoint import bind_checkpoint
from fxlm.passes.cleanup import cleanup
from fxlm.passes.cut_stages import cut_stages
from fxlm.passes.fuse_activation import fuse_activation
from fxlm.passes.fuse_gate_up import fuse_gate_up
from fxlm.passes.fuse_qkv import fuse_qkv
from fxlm.passes.fuse_quantized_linear import fuse_quantized_linear
from fxlm.passes.last_tokens import last_tokens
from fxlm.passes.pack_linears import pack_linears
from fxlm.passes.paged_attention import paged_attention
from fxlm.passes.quantize import quantize
from fxlm.passes.sample import sample
from fxlm.passes.shard import shard
from fxlm.passes.split_rope import split_rope
from fxlm.passes.steer import steer
from fxlm.passes.tap import tap
from fxlm.passes.verify import verify

COLUMN: tuple[GraphPass, ...] = (
    bind_checkpoint,  # parameters -> tensors of the checkpoint, as graph code
    cleanup,  # drop assertions, identities, full slices
    shard,  # this rank's part of the model; left out unless several ranks share it
    quantize,  # weights of linears rounded while loading; left out unless it is asked for
    fuse_qkv,  # one matmul for q, k, v
    fuse_gate_up,  # one matmul for gate and up
    steer,  # a request's own vector, added at --steer points
    tap,  # hidden states of --tap points leave the graph
    paged_attention,  # attention over block tables; the cache is written in the graph
    last_tokens,  # logits only for the rows that are drawn or scored
    sample,  # token ids leave the graph, logits do not
    verify,  # counts the drafted tokens that hold; only where something is drafted
    cut_stages,  # this stage's layers; left out unless several stages share the model
    split_rope,  # rotary embeddings without a copy of swapped halves
    fuse_quantized_linear,  # linears that read quantized weights as they are
    pack_linears,  # weights in panels; left out where it does not pay
    fuse_activation,  # both kinds apply the activation and the gate that follow, too
)

REQUIRED = ("bind_checkpoint", "paged_attention", "last_tokens", "sample")


def default_column(**options: dict[str, Any]) -> list[GraphPass]:
    """The column, with options for some passes by name, e.g. ``bind_checkpoint={...}``."""
    known = {item.name for item in COLUMN}
    assert set(options) <= known, (sorted(options), sorted(known))
    return [replace(item, options=options.get(item.name, {})) for item in COLUMN]
