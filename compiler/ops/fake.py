"""Schemas of the ops, the shapes of their results, and registration of the references.

The same two functions serve as fakes for tracing and as ``Meta`` kernels. Shapes may be symbolic:
nothing here compares them, so that a dynamic size stays dynamic from 1 up.

Every op with a CPU kernel has a twin ``*_reference`` of the same schema. The kernels call it for
what they do not cover (float64), and tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxlm.compiler.ops import kv_cache, linear, quantized, reference

ATTENTION = (
    "(Tensor q, Tensor k, Tensor v, int layer, float scale, int window, int chunk, "
    "float softcap, Tensor? sinks, Tensor? slopes) -> Tensor"
)
PAGED_ATTENTION = (
    "(Tensor q, Tensor? k, Tensor? v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor slot_mapping, Tensor query_start, Tensor seq_lens, Tensor block_table, "
    "float scale, int window, int chunk, float softcap, Tensor? sinks, Tensor? slopes, "
    "Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor"
)
SAMPLE = (
    "(Tensor logits, Tensor floats, Tensor ints, Tensor adjust_start, Tensor adjust_ids, "
    "Tensor adjust_counts, Tensor adjust_bias, int max_logprobs) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


_Definition = tuple[str, str, Callable[..., Any], Callable[..., Any]]  # name, schema, kernel, fake


def register() -> torch.library.Library:
    """Define the ops and register references and fakes; the result must be kept alive."""
    library = torch.library.Library("fxlm", "DEF")
    for name, schema, kernel, fake in (
        ("paged_attention", PAGED_ATTENTION, reference.paged_attention, paged_attention),
        ("sample", SAMPLE, reference.sample, sample),
        ("pack_weight", linear.PACK_WEIGHT, linear.pack_weight, linear.fake_pack_weight),
        ("packed_linear", linear.PACKED_LINEAR, linear.packed_linear, linear.fake_packed_linear),
        (
            *("packed_grouped_linear", linear.PACKED_GROUPED),
            *(linear.packed_grouped, linear.fake_packed_grouped),
        ),
        ("packed_rows", linear.PACKED_ROWS, linear.packed_rows, linear.fake_packed_rows),
    ):
        _register(library, name, schema, kernel, fake)
        _register(library, f"{name}_reference", schema, kernel, fake)
    _register(library, "attention", ATTENTION, reference.attention, attention)
    _register_quantized(library)
    return library


def _register_quantized(library: torch.library.Library) -> None:
    """Ops of `fxlm.compiler.ops.quantized`; the packed ones have twins, the others no kernel."""
    q = quantized
    plain: list[_Definition] = [
        ("dequantize", q.DEQUANTIZE, q.dequantize, q.fake_dequantize),
        ("code_book", q.CODE_BOOK, q.code_book, q.fake_code_book),
        ("quantize_int", q.QUANTIZE_INT, q.quantize_int, q.fake_quantize_int),
        ("quantize_fp8", q.QUANTIZE_FP8, q.quantize_fp8, q.fake_quantize_fp8),
    ]
    packed: list[_Definition] = [
        ("pack_codes", q.PACK_CODES, q.pack_codes, q.fake_pack_codes),
        ("pack_scale", q.PACK_SCALE, q.pack_scale, q.fake_pack_scale),
        ("quantized_linear", q.QUANTIZED_LINEAR, q.quantized_linear, q.fake_quantized_linear),
        ("quantized_rows", q.QUANTIZED_ROWS, q.quantized_rows, q.fake_quantized_rows),
    ]
    for definition in plain + packed:
        _register(library, *definition)
    for name, schema, kernel, fake in packed:
        _register(library, f"{name}_reference", schema, kernel, fake)


def _register(
    library: torch.library.Library,
    name: str,
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
) -> None:
    # flexible_layout: every kernel takes any strides, so Inductor need not copy the inputs.
    library.define(name + schema, tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag))
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxlm::{name}", fake, lib=library)


def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    """q [1,Hq,T,Dk], v [1,Hkv,T,Dv] -> [1,T,Hq,Dv], contiguous."""
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


def paged_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, k_cache: Tensor, v_cache: Tensor, *_: Any
) -> Tensor:
    """q [1,Hq,T,Dk], v_cache [blocks,Hkv,block_size,Dv + scale] -> [1,T,Hq,Dv], contiguous."""
    width = v_cache.shape[3] - kv_cache.scale_columns(v_cache.dtype)
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], width))


def sample(
    logits: Tensor,
    floats: Tensor,
    ints: Tensor,
    adjust_start: Tensor,
    adjust_ids: Tensor,
    adjust_counts: Tensor,
    adjust_bias: Tensor,
    max_logprobs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [R,V] -> token_ids [R], logprobs [R,L+1], logprob_ids [R,L+1], ranks [R]."""
    rows, columns = logits.shape[0], max_logprobs + 1
    return (
        logits.new_empty((rows,), dtype=torch.int64),
        logits.new_empty((rows, columns), dtype=torch.float32),
        logits.new_empty((rows, columns), dtype=torch.int64),
        logits.new_empty((rows,), dtype=torch.int64),
    )
