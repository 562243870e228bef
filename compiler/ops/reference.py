"""The ops in plain PyTorch: any device, any float dtype; what the kernels are tested against.

Attention is computed in float32 for 16-bit inputs and in the input's dtype otherwise, so that a
graph run in float64 is an oracle. Nothing here is fast: a loop over the sequences of a step, and
a full sort of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxlm.compiler.ops import kv_cache

QUERY_TILE = 256  # queries whose scores are held at once: bounds memory to tile x keys x heads
GREEDY_BELOW = 1e-5  # temperatures below are greedy: dividing by them overflows
NEGATIVE_INFINITY = float("-inf")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: int,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    sinks: Tensor | None,
    slopes: Tensor | None,
) -> Tensor:
    """Causal attention of sequences of T tokens at positions 0..T-1.

    Args:
        q, k, v: [1,Hq,T,Dk], [1,Hkv,T,Dk], [1,Hkv,T,Dv]; Hq a multiple of Hkv.
        layer: index of the layer; not used here, it names the cache that a pass puts in.
        scale: factor of the scores.
        window: a query at p sees keys p-window+1..p; 0 = all.
        chunk: a query at p sees keys with key // chunk == p // chunk; 0 = all.
        softcap: scores become softcap * tanh(score / softcap); 0 = off.
        sinks: [Hq], one more logit a head in the denominator.
        slopes: [Hq], ALiBi: slope * (key - query) is added to the scores.

    Returns:
        [1,T,Hq,Dv], contiguous.
    """
    rules = (scale, window, chunk, softcap, sinks, slopes)
    rows = [attend(q[i], k[i], v[i], 0, 0, *rules) for i in range(q.shape[0])]
    return torch.stack(rows)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_query: int,
    first_key: int,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    sinks: Tensor | None,
    slopes: Tensor | None,
) -> Tensor:
    """One sequence: q [Hq,T,Dk] at first_query.., k, v [Hkv,N,D] at first_key.. -> [T,Hq,Dv]."""
    heads, length, _ = q.shape
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = heads // k.shape[0]
    keys, values = k.to(exact).transpose(1, 2), v.to(exact)
    out = q.new_empty((length, heads, v.shape[2]))
    key_positions = torch.arange(first_key, first_key + k.shape[1], device=q.device)
    for begin in range(0, length, QUERY_TILE):
        tile = q[:, begin : begin + QUERY_TILE].to(exact)
        size = tile.shape[1]
        start = first_query + begin
        positions = torch.arange(start, start + size, device=q.device)
        distance = key_positions[None, :] - positions[:, None]  # [size, N], <= 0 where causal
        scores = tile.reshape(k.shape[0], group * size, -1) @ keys
        scores = (scores * scale).view(heads, size, -1)
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is not None:
            scores = scores + slopes.to(exact)[:, None, None] * distance.to(exact)
        hidden = distance > 0
        if window > 0:
            hidden = hidden | (distance <= -window)
        if chunk > 0:
            hidden = hidden | (key_positions[None, :] // chunk != positions[:, None] // chunk)
        scores = scores.masked_fill(hidden, NEGATIVE_INFINITY)
        weights = _softmax(scores, sinks)
        mixed = weights.view(k.shape[0], group * size, -1) @ values
        out[begin : begin + size] = mixed.view(heads, size, -1).transpose(0, 1).to(out.dtype)
    return out


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    sink = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
    return torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]


def paged_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    sinks: Tensor | None,
    slopes: Tensor | None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Write k and v into the cache, then attend causally through the block table.

    Args:
        q, k, v: as in `attention`, T the tokens of all sequences one after another; k and v
            None: the cache holds them already (a layer that shares another's cache).
        k_cache, v_cache: [blocks,Hkv,block_size,D], written in place; see `kv_cache`.
        slot_mapping: [T], block * block_size + offset of each token; -1 = do not write.
        query_start: [S+1], prefix sums of tokens a sequence.
        seq_lens: [S], tokens in the cache with those of this call.
        block_table: [S,B], physical blocks of each sequence.
        scale, window, chunk, softcap, sinks, slopes: as in `attention`.
        k_scale, v_scale: scales to store codes with, one value or one a KV head; None: each
            token and head gets its own.

    Returns:
        [1,T,Hq,Dv]; tokens past query_start[S] are zero.
    """
    if k is not None and v is not None:
        kv_cache.write(k_cache, k[0], slot_mapping, keys=True, scale=k_scale)
        kv_cache.write(v_cache, v[0], slot_mapping, keys=False, scale=v_scale)
    width = v_cache.shape[3] - kv_cache.scale_columns(v_cache.dtype)
    out = q.new_zeros((1, q.shape[2], q.shape[1], width))
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    block_size = k_cache.shape[2]
    for row, length in enumerate(lengths):
        begin, end = starts[row], starts[row + 1]
        if begin == end:
            continue
        first = length - (end - begin)  # position of the first query
        low = max(first - window + 1, 0) if window > 0 else 0
        low = max(low, first // chunk * chunk) if chunk > 0 else low
        blocks = block_table[row, low // block_size : -(-length // block_size)].long()
        skipped = low // block_size * block_size
        keys = kv_cache.gather(k_cache, blocks, length - skipped, keys=True)
        values = kv_cache.gather(v_cache, blocks, length - skipped, keys=False)
        rules = (scale, window, chunk, softcap, sinks, slopes)
        out[0, begin:end] = attend(q[0, :, begin:end], keys, values, first, skipped, *rules)
    return out


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
    """Adjust, filter and draw one token a row; logprobs of the raw logits.

    NaN counts as -inf; a row without a finite logit gives token 0. Ids of one row are distinct;
    an id outside of the vocabulary is ignored.

    Args:
        logits: [R,V], any float dtype; computed in float32.
        floats: [R,6] temperature, top_p, min_p, repetition, presence, frequency.
        ints: [R,5] top_k, seed, counter, num_logprobs, target.
        adjust_start, adjust_ids, adjust_counts, adjust_bias: [R+1], [N], [N], [N].
        max_logprobs: L, columns of the logprobs less one.

    Returns:
        token_ids [R], logprobs [R,L+1], logprob_ids [R,L+1], ranks [R] (1 = most likely).
    """
    raw = _finite(logits.float())
    adjusted = _adjust(raw, floats, adjust_start, adjust_ids, adjust_counts, adjust_bias)
    tokens = adjusted.argmax(dim=-1)
    drawn = floats[:, 0] >= GREEDY_BELOW
    if bool((drawn & (ints[:, 4] < 0)).any()):
        tokens = torch.where(drawn, _draw(adjusted, floats, ints), tokens)
    dead = adjusted.amax(dim=-1) == NEGATIVE_INFINITY
    tokens = torch.where(dead, torch.zeros_like(tokens), tokens)
    tokens = torch.where(ints[:, 4] >= 0, ints[:, 4], tokens)
    return (tokens, *_logprobs(raw, tokens, max_logprobs))


def _finite(logits: Tensor) -> Tensor:
    """NaN -> -inf; +inf -> the largest float; -0 -> +0."""
    low, high = NEGATIVE_INFINITY, torch.finfo(torch.float32).max
    return torch.nan_to_num(logits, nan=low, posinf=high, neginf=low) + 0.0


def _adjust(
    raw: Tensor, floats: Tensor, start: Tensor, ids: Tensor, counts: Tensor, bias: Tensor
) -> Tensor:
    rows, vocabulary = raw.shape
    entry = torch.arange(ids.shape[0], device=raw.device, dtype=start.dtype)
    row = torch.searchsorted(start[1:].contiguous(), entry, right=True)
    used = (entry >= start[0]) & (row < rows) & (ids >= 0) & (ids < vocabulary)
    row, ids, counts, bias = row[used], ids[used], counts[used], bias[used]
    repetition, presence, frequency = floats[row, 3], floats[row, 4], floats[row, 5]
    old = raw[row, ids]
    new = torch.where(old > 0, old / repetition, old * repetition)
    new = torch.where(counts >= 0, new, old)
    new = new - frequency * counts.clamp(min=0)
    new = new - presence * (counts > 0)
    adjusted = raw.clone()
    adjusted[row, ids] = _finite(new + bias)
    return adjusted


def _draw(adjusted: Tensor, floats: Tensor, ints: Tensor) -> Tensor:
    """An exponential race over what the filters leave: least exponential / weight wins. [R]

    The filters cut the order (logit descending, id ascending) at one place. A token's exponential
    depends on (seed, counter, token) alone, so that similar logits mostly draw the same token.
    """
    logits, ids = torch.sort(adjusted, dim=-1, descending=True, stable=True)
    temperature, top_p, min_p = (floats[:, i : i + 1] for i in range(3))
    inverse = 1.0 / torch.where(temperature >= GREEDY_BELOW, temperature, 1.0)
    scaled = (logits - logits[:, :1]) * inverse
    weights = torch.exp(scaled)
    place = torch.arange(logits.shape[1], device=logits.device)
    top_k = torch.where(ints[:, :1] > 0, ints[:, :1], logits.shape[1])
    keep = (weights >= min_p) & (place < top_k)
    mass = torch.where(keep, weights, 0.0).double()
    total = mass.cumsum(-1)
    before = total - mass
    keep &= (before < top_p.double() * total[:, -1:]) | (top_p >= 1)
    keep[:, 0] = True
    times = -torch.log1p(-uniform(ints[:, 1:2], ints[:, 2:3], ids)) / torch.exp(scaled.double())
    times = torch.where(keep & (scaled > NEGATIVE_INFINITY), times, -NEGATIVE_INFINITY)
    return ids.gather(1, times.argmin(-1, keepdim=True))[:, 0]


def uniform(seed: Tensor, counter: Tensor, token: Tensor) -> Tensor:
    """A float64 in [0,1) with 53 random bits that depends on (seed, counter, token) alone."""
    bits = _splitmix64(_splitmix64(_splitmix64(seed) + counter) + token)
    return _shift_right(bits, 11).double() * 2.0**-53


def _splitmix64(state: Tensor) -> Tensor:
    """Steele, Lea and Flood 2014, on int64 that wraps (torch has no uint64 arithmetic)."""
    z = state - 0x61C8864680B583EB  # + 0x9E3779B97F4A7C15 modulo 2**64
    z = (z ^ _shift_right(z, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    z = (z ^ _shift_right(z, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return z ^ _shift_right(z, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _logprobs(raw: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    vocabulary = raw.shape[1]
    known = (tokens >= 0) & (tokens < vocabulary)
    chosen = raw.gather(1, torch.where(known, tokens, 0)[:, None])
    chosen = torch.where(known[:, None], chosen, NEGATIVE_INFINITY)
    ranks = 1 + (raw > chosen).sum(-1)
    top, ids = torch.sort(raw, dim=-1, descending=True, stable=True)
    top, ids = top[:, :count], ids[:, :count]
    if vocabulary < count:
        top = torch.nn.functional.pad(top, (0, count - vocabulary), value=NEGATIVE_INFINITY)
        ids = torch.nn.functional.pad(ids, (0, count - vocabulary))
    norm = torch.logsumexp(raw.double(), dim=-1, keepdim=True)
    norm = torch.where(norm == NEGATIVE_INFINITY, 0.0, norm)
    logprobs = (torch.cat([chosen, top], dim=1).double() - norm).float()
    return logprobs, torch.cat([tokens[:, None], ids], dim=1), ranks
