"""Attention over a paged KV cache, for a ragged batch.

before:  o = fxlm.attention(q, k, v, layer, scale, window, chunk, softcap, sinks, slopes)
after:   o = fxlm.paged_attention(q, k, v, k_cache, v_cache, slot_mapping, query_start,
                                  seq_lens, block_table, scale, window, ...)

The cache is written and read inside the op, each layer in tensors of its own, so layers may
differ in heads and head size. Shapes of q, k, v and o stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import CacheSpec, Input, Program


def _attention_nodes(program: Program) -> int:
    return len(program.find(torch.ops.fxlm.attention.default))


@graph_pass(stage="paged", expects=_attention_nodes)
def paged_attention(program: Program, *, cache_dtype: torch.dtype | None = None) -> int:
    """Replace each attention; returns how many.

    Args:
        cache_dtype: element type of the cache; that of k if not given.
    """
    metadata = [
        program.step_input("slot_mapping", ["T"], torch.int64),
        program.step_input("query_start", ["S+1"], torch.int32),
        program.step_input("seq_lens", ["S"], torch.int32),
        program.step_input("block_table", ["S", "B"], torch.int32),
    ]
    nodes = program.find(torch.ops.fxlm.attention.default)
    for index, node in enumerate(nodes):
        caches = _add_caches(program, node, index, cache_dtype)
        _replace(program, node, caches, metadata)
    return len(nodes)


def _add_caches(
    program: Program, node: fx.Node, index: int, cache_dtype: torch.dtype | None
) -> list[fx.Node]:
    k: Any = node.args[1].meta["val"]  # type: ignore[union-attr]
    v: Any = node.args[2].meta["val"]  # type: ignore[union-attr]
    spec = CacheSpec(
        num_kv_heads=int(k.shape[1]),
        key_dim=int(k.shape[3]),
        value_dim=int(v.shape[3]),
        dtype=cache_dtype or k.dtype,
    )
    program.caches.append(spec)
    nodes = []
    for name, dim in (("k", spec.key_dim), ("v", spec.value_dim)):
        shape: list[int | str] = ["blocks", spec.num_kv_heads, program.facts.block_size, dim]
        value = program.fake_tensor(shape, spec.dtype)
        meaning = Input(role="cache", source=name, layer=index)
        nodes.append(program.add_input(f"{name}_cache_{index}", meaning, value))
    return nodes


def _replace(
    program: Program, node: fx.Node, caches: list[fx.Node], metadata: list[fx.Node]
) -> None:
    q, k, v, _layer, *settings = node.args
    with program.graph.inserting_before(node):
        paged = program.call(
            torch.ops.fxlm.paged_attention.default,
            q, k, v, *caches, *metadata, *settings, like=node,
        )  # fmt: skip
    program.replace(node, paged)
