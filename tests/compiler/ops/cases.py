"""Random steps of paged attention and of sampling, and naive answers to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxlm.compiler.ops import kv_cache


@dataclass(kw_only=True)
class Rules:
    """The attention arguments that are not tensors of the step."""

    scale: float = 0.2
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None
    slopes: Tensor | None = None

    def args(self) -> tuple[Any, ...]:
        return (self.scale, self.window, self.chunk, self.softcap, self.sinks, self.slopes)


@dataclass(kw_only=True)
class Step:
    """One call: the tokens of `queries` of each sequence after `contexts` that are cached."""

    queries: list[int]
    contexts: list[int]
    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    seq_lens: Tensor
    block_table: Tensor
    full: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # [Hkv,N,D] each

    def args(self) -> tuple[Tensor, ...]:
        return (
            *(self.q, self.k, self.v, self.k_cache, self.v_cache),
            *(self.slot_mapping, self.query_start, self.seq_lens, self.block_table),
        )

    def cloned(self) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in self.args())


def empty_cache(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """[blocks,H,block_size,D]: NaN everywhere, in scales too where there are any."""
    *front, width = shape
    size = (*front, width + kv_cache.scale_columns(dtype))
    if not kv_cache.is_coded(dtype):
        return torch.full(size, float("nan"), dtype=dtype)
    return torch.full(size, 255, dtype=torch.uint8).view(dtype)


def read_cache(cache: Tensor, *, keys: bool) -> Tensor:
    """A cache as floats in the order of tokens: [H, blocks * block_size, D]."""
    every = torch.arange(cache.shape[0])
    return kv_cache.gather(cache, every, cache.shape[0] * cache.shape[2], keys=keys)


def make_step(
    queries: list[int],
    contexts: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dk: int = 16,
    dv: int | None = None,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Step:
    """Caches hold NaN wherever no token was written; q, k and v are transposed views."""
    generator = torch.Generator().manual_seed(seed)
    dv = dv or dk
    tokens = sum(queries)
    lengths = [a + b for a, b in zip(queries, contexts, strict=True)]
    columns = max(-(-n // block_size) for n in lengths) + 1
    blocks = len(queries) * columns + 1
    table = (torch.randperm(blocks - 1, generator=generator) + 1).view(len(queries), columns)
    table = table.to(torch.int32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    kind = cache_dtype or dtype
    caches = tuple(empty_cache((blocks, kv_heads, block_size, d), kind) for d in (dk, dv))
    full, slots = [], []
    new: tuple[list[Tensor], list[Tensor]] = ([], [])
    for row, (length, context) in enumerate(zip(lengths, contexts, strict=True)):
        sequence = (normal(kv_heads, length, dk), normal(kv_heads, length, dv))
        full.append(sequence)
        place = table[row, torch.arange(length) // block_size].long()
        offset = torch.arange(length) % block_size
        places = place * block_size + offset
        for cache, values, fresh, keys in zip(caches, sequence, new, (True, False), strict=True):
            kv_cache.write(cache, values[:, :context], places[:context], keys=keys, scale=None)
            fresh.append(values[:, context:].transpose(0, 1))
        slots.append(places[context:])
    starts = torch.tensor([0, *queries]).cumsum(0)
    return Step(
        queries=queries,
        contexts=contexts,
        q=normal(1, tokens, heads, dk).transpose(1, 2),
        k=torch.cat(new[0])[None].transpose(1, 2),
        v=torch.cat(new[1])[None].transpose(1, 2),
        k_cache=caches[0],
        v_cache=caches[1],
        slot_mapping=torch.cat(slots),
        query_start=starts.to(torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table=table,
        full=full,
    )


def naive_attention(q: Tensor, k: Tensor, v: Tensor, first: int, rules: Rules) -> Tensor:
    """q [Hq,T,Dk] from position `first` on, k, v [Hkv,N,D] -> [T,Hq,Dv], a loop in float64."""
    heads, length, _ = q.shape
    group = heads // k.shape[0]
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty(length, heads, v.shape[2], dtype=torch.float64)
    for t in range(length):
        at = first + t
        seen = [j for j in range(at + 1) if _sees(at, j, rules)]
        for h in range(heads):
            score = (k[h // group, seen] @ q[h, t]) * rules.scale
            if rules.softcap:
                score = rules.softcap * torch.tanh(score / rules.softcap)
            if rules.slopes is not None:
                score = score + rules.slopes[h].double() * (torch.tensor(seen) - at)
            if rules.sinks is not None:
                score = torch.cat([score, rules.sinks[h].double()[None]])
            weight = torch.softmax(score, 0)[: len(seen)]
            out[t, h] = weight @ v[h // group, seen]
    return out


def _sees(at: int, key: int, rules: Rules) -> bool:
    if rules.window and key <= at - rules.window:
        return False
    return not (rules.chunk and key // rules.chunk != at // rules.chunk)


def naive_step(step: Step, rules: Rules) -> Tensor:
    """[1,T,Hq,Dv] in float64."""
    rows, begin = [], 0
    for count, context, (k, v) in zip(step.queries, step.contexts, step.full, strict=True):
        rows.append(naive_attention(step.q[0, :, begin : begin + count], k, v, context, rules))
        begin += count
    return torch.cat(rows)[None]


@dataclass(kw_only=True)
class Row:
    """One row of a sampler call."""

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    top_k: int = 0
    seed: int = 0
    counter: int = 0
    num_logprobs: int = -1
    target: int = -1
    adjust: list[tuple[int, int, float]] = field(default_factory=list)  # id, count, bias


def sample_args(logits: Tensor, rows: list[Row], max_logprobs: int = 20) -> tuple[Any, ...]:
    """The arguments of fxlm::sample, padded by one entry that no row owns."""
    entries = [entry for row in rows for entry in row.adjust]
    starts = torch.tensor([0, *(len(row.adjust) for row in rows)]).cumsum(0)
    ids, counts, bias = zip(*entries, (0, 0, 0.0), strict=True)
    floats = [
        (r.temperature, r.top_p, r.min_p, r.repetition, r.presence, r.frequency) for r in rows
    ]
    ints = [(r.top_k, r.seed, r.counter, r.num_logprobs, r.target) for r in rows]
    return (
        logits,
        torch.tensor(floats, dtype=torch.float32),
        torch.tensor(ints, dtype=torch.int64),
        starts.to(torch.int32),
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(counts, dtype=torch.int32),
        torch.tensor(bias, dtype=torch.float32),
        max_logprobs,
    )
