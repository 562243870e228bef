"""Attention over a paged KV cache, for a ragged batch.

before:  o = fxlm.attention(q, k, v, layer, scale, window, chunk, softcap, sinks, slopes)
after:   o = fxlm.paged_attention(q, k, v, k_cache, v_cache, slot_mapping, query_start,
                                  seq_lens, block_table, scale, window, ..., k_scale, v_scale)

The cache is written and read inside the op, each layer in tensors of its own, so layers may
differ in heads and head size. Shapes of q, k, v and o stay.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxlm.compiler.errors import InvalidOption
from fxlm.compiler.ops.kv_cache import is_coded
from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import CacheSpec, Input, Program, Raw


def _attention_nodes(program: Program) -> int:
    return len(program.find(torch.ops.fxlm.attention.default))


@graph_pass(stage="paged", expects=_attention_nodes)
def paged_attention(
    program: Program,
    *,
    cache_dtype: torch.dtype | None = None,
    scales: Mapping[int, tuple[Raw, Raw]] | None = None,
) -> int:
    """Replace each attention; returns how many.

    Args:
        cache_dtype: element type of the cache; that of k if not given. A type of codes
            (`fxlm.compiler.ops.kv_cache`) has a scale for each token and head.
        scales: by layer, the tensors of the checkpoint that hold the scale to store k with, and
            that of v (one value, or one a KV head); those of the program's facts if not given.
            Layers left out take scales of their own.

    Raises:
        InvalidOption: a head size that codes cannot be packed for.
    """
    metadata = [
        program.step_input("slot_mapping", ["T"], torch.int64),
        program.step_input("query_start", ["S+1"], torch.int32),
        program.step_input("seq_lens", ["S"], torch.int32),
        program.step_input("block_table", ["S", "B"], torch.int32),
    ]
    nodes = program.find(torch.ops.fxlm.attention.default)
    scales = program.facts.kv_scales if scales is None else scales
    for index, node in enumerate(nodes):
        caches = _add_caches(program, node, index, cache_dtype)
        layer: Any = node.args[3]
        fixed = [_scale(program, node, raw) for raw in scales.get(layer, ())]
        _replace(program, node, caches, metadata, fixed or [None, None])
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
        if is_coded(spec.dtype) and dim % 4:
            reason = f"heads of size {dim} cannot be packed in codes; use auto"
            raise InvalidOption("kv_cache_dtype", str(spec.dtype), reason)
        block_size = program.facts.block_size
        shape: list[int | str] = ["blocks", spec.num_kv_heads, block_size, spec.columns(dim)]
        value = program.fake_tensor(shape, spec.dtype)
        meaning = Input(role="cache", source=name, layer=index)
        nodes.append(program.add_input(f"{name}_cache_{index}", meaning, value))
    return nodes


def _scale(program: Program, node: fx.Node, raw: Raw) -> fx.Node:
    """Graph code that makes [1] or [heads] float32 of a tensor in the checkpoint."""
    name, dtype, shape = raw
    value = program.fake_tensor(list(shape), dtype)
    stored = program.add_input(re.sub(r"\W", "_", name), Input(role="weight", source=name), value)
    with program.graph.inserting_before(node):
        flat = program.call(torch.ops.aten.reshape.default, stored, [-1], like=node)
        return program.call(torch.ops.aten._to_copy.default, flat, dtype=torch.float32, like=node)


def _replace(
    program: Program,
    node: fx.Node,
    caches: list[fx.Node],
    metadata: list[fx.Node],
    scales: Sequence[fx.Node | None],
) -> None:
    q, k, v, _layer, *settings = node.args
    with program.graph.inserting_before(node):
        paged = program.call(
            torch.ops.fxlm.paged_attention.default,
            q, k, v, *caches, *metadata, *settings, *scales, like=node,
        )  # fmt: skip
    program.replace(node, paged)
