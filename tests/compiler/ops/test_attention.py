"""Attention: references against a naive loop, the CPU kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from fxlm.compiler.ops import kv_cache, reference
from tests.compiler.ops import cases
from tests.compiler.ops.cases import Rules, Step, make_step

FEATURES = {
    "plain": Rules(),
    "window": Rules(window=7),
    "window_1": Rules(window=1),
    "chunk": Rules(chunk=5),
    "softcap": Rules(scale=2.0, softcap=3.0),
    "sinks": Rules(sinks=torch.tensor([0.5, -1.0, 2.0, float("-inf")])),
    "slopes": Rules(slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625])),
    "all": Rules(
        window=9,
        softcap=5.0,
        sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]),
        slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625]),
    ),
}
KEYS = (True, False)  # of the caches, in the order of the arguments
CODED = (torch.int8, torch.float8_e4m3fn)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def kernel(args: tuple[torch.Tensor, ...], rules: Rules) -> torch.Tensor:
    return torch.ops.fxlm.paged_attention(*args, *rules.args())


@pytest.mark.parametrize("name", FEATURES)
def test_reference_of_placeholder_equals_naive_loop(name: str) -> None:
    rules = FEATURES[name]
    step = make_step([23], [0], dk=8, dv=12)
    got = torch.ops.fxlm.attention(step.q, step.k, step.v, 3, *rules.args())
    torch.testing.assert_close(got.double(), cases.naive_step(step, rules), atol=2e-6, rtol=2e-5)


def test_placeholder_in_float64_is_exact() -> None:
    step = make_step([19], [0])
    q, k, v = (x.double() for x in (step.q, step.k, step.v))
    got = torch.ops.fxlm.attention(q, k, v, 0, *Rules().args())
    torch.testing.assert_close(got, cases.naive_step(step, Rules()), atol=1e-14, rtol=1e-12)


def test_query_tiles_of_the_reference_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step([23], [0])
    whole = reference.attention(step.q, step.k, step.v, 0, *Rules(window=6).args())
    monkeypatch.setattr(reference, "QUERY_TILE", 4)
    tiled = reference.attention(step.q, step.k, step.v, 0, *Rules(window=6).args())
    torch.testing.assert_close(tiled, whole)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("which", ["paged_attention", "paged_attention_reference"])
def test_paged_equals_naive_loop_on_a_ragged_batch(which: str, name: str) -> None:
    rules = FEATURES[name]
    step = make_step([5, 1, 12, 1, 3], [0, 30, 9, 0, 17], block_size=4)
    got = getattr(torch.ops.fxlm, which)(*step.cloned(), *rules.args())
    torch.testing.assert_close(got.double(), cases.naive_step(step, rules), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256, 20, 7])
def test_kernel_equals_reference(dtype: torch.dtype, width: int) -> None:
    rules = Rules(scale=width**-0.5)
    step = make_step([1, 37, 1, 70], [300, 0, 515, 13], heads=6, dk=width, dtype=dtype)
    want = torch.ops.fxlm.paged_attention_reference(*step.cloned(), *rules.args())
    got = kernel(step.cloned(), rules)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("cache_dtype", CODED)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256, 20])
def test_kernel_equals_reference_over_codes(
    cache_dtype: torch.dtype, dtype: torch.dtype, width: int
) -> None:
    """The reference reads the same codes, so that what is left is the arithmetic."""
    rules = Rules(scale=width**-0.5, window=400, sinks=torch.linspace(-1, 1, 6))
    step = make_step(
        [1, 37, 1, 70], [300, 0, 515, 13], heads=6, dk=width, dtype=dtype, cache_dtype=cache_dtype
    )
    args, twins = step.cloned(), step.cloned()
    want = torch.ops.fxlm.paged_attention_reference(*twins, *rules.args())
    got = kernel(args, rules)
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    for mine, theirs in zip(args[3:5], twins[3:5], strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("cache_dtype", CODED)
@pytest.mark.parametrize("which", ["paged_attention", "paged_attention_reference"])
def test_codes_of_kernel_and_reference_are_near_the_naive_loop(
    which: str, cache_dtype: torch.dtype
) -> None:
    step = make_step([5, 1, 12], [0, 60, 9], cache_dtype=cache_dtype)
    want = cases.naive_step(step, Rules())
    got = getattr(torch.ops.fxlm, which)(*step.cloned(), *Rules().args())
    error = float((got.double() - want).norm() / want.norm())
    # int8 rounds to 1/254 of the largest of 16, fp8 to 1/16 of each: uniform errors, so / sqrt 3
    assert 1e-4 < error < {torch.int8: 0.012, torch.float8_e4m3fn: 0.06}[cache_dtype]


@pytest.mark.parametrize("cache_dtype", CODED)
@pytest.mark.parametrize("which", ["paged_attention", "paged_attention_reference"])
def test_a_scale_of_the_checkpoint_is_what_codes_are_stored_with(
    which: str, cache_dtype: torch.dtype
) -> None:
    step = make_step([6], [0], cache_dtype=cache_dtype)
    args = step.cloned()
    scales = (torch.tensor([0.125]), torch.tensor([0.25, 0.5]))
    getattr(torch.ops.fxlm, which)(*args, *Rules().args(), *scales)
    largest = kv_cache.LARGEST[cache_dtype]
    pairs = zip(args[3:5], (step.k, step.v), scales, KEYS, strict=True)
    for cache, new, scale, keys in pairs:
        stored = cases.read_cache(cache, keys=keys)[:, step.slot_mapping]
        factor = scale.expand(2)[:, None, None]
        codes = (new[0] / factor).clamp(-largest, largest)
        codes = codes.round() if cache_dtype == torch.int8 else codes.to(cache_dtype).float()
        assert torch.equal(stored, codes * factor)


@pytest.mark.parametrize("which", ["paged_attention", "paged_attention_reference"])
def test_a_token_that_is_not_finite_is_not_lost_in_codes(which: str) -> None:
    step = make_step([3], [0], cache_dtype=torch.int8)
    args = step.cloned()
    args[2][0, 0, 1, 3] = float("inf")
    got = getattr(torch.ops.fxlm, which)(*args, *Rules().args())[0]
    assert got[1:, :2].isnan().all()  # the heads over KV head 0, from that token on
    assert got[:, 2:].isfinite().all()


@pytest.mark.parametrize("heads_and_kv", [(1, 1), (8, 8), (8, 1), (71, 1), (130, 1), (14, 2)])
@pytest.mark.parametrize("block_size", [1, 24, 16, 32, 64, 128])
def test_kernel_with_groups_and_block_sizes(heads_and_kv: tuple[int, int], block_size: int) -> None:
    heads, kv_heads = heads_and_kv
    shape = {"heads": heads, "kv_heads": kv_heads, "dk": 24, "dv": 40, "block_size": block_size}
    step = make_step([1, 9, 1], [77, 60, 0], **shape)
    rules = Rules(window=50)
    want = torch.ops.fxlm.paged_attention_reference(*step.cloned(), *rules.args())
    torch.testing.assert_close(kernel(step.cloned(), rules), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("rules", [Rules(), Rules(window=300), Rules(chunk=100)])
def test_long_context_over_several_splits(rules: Rules) -> None:
    step = make_step([1, 2], [2100, 1021], heads=2, kv_heads=1)
    want = torch.ops.fxlm.paged_attention_reference(*step.cloned(), *rules.args())
    torch.testing.assert_close(kernel(step.cloned(), rules), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("which", ["paged_attention", "paged_attention_reference"])
def test_cache_is_written_where_the_slots_say(which: str) -> None:
    step = make_step([6, 3], [4, 0])
    args = step.cloned()
    args[5][2] = -1
    before = [cases.read_cache(x, keys=keys) for x, keys in zip(args[3:5], KEYS, strict=True)]
    getattr(torch.ops.fxlm, which)(*args, *Rules().args())
    after = [cases.read_cache(x, keys=keys) for x, keys in zip(args[3:5], KEYS, strict=True)]
    slots = step.slot_mapping.tolist()
    for found, new in zip(after, (step.k, step.v), strict=True):
        for index, slot in enumerate(slots):
            stored = found[:, slot]
            assert stored.isnan().all() if index == 2 else torch.equal(stored, new[0, :, index])
    others = torch.ones(before[0].shape[1], dtype=torch.bool)
    others[slots] = False
    for old, found in zip(before, after, strict=True):
        assert torch.equal(old[:, others].nan_to_num(9), found[:, others].nan_to_num(9))


def test_read_only_layer_sees_the_cache_of_another() -> None:
    step = make_step([6, 1], [4, 20])
    args = step.cloned()
    first = kernel(args, Rules())
    kept = args[3].clone()
    shared = (args[0], None, None, *args[3:])
    assert torch.equal(torch.ops.fxlm.paged_attention(*shared, *Rules().args()), first)
    assert torch.equal(args[3].nan_to_num(9), kept.nan_to_num(9))


def test_any_strides() -> None:
    step = make_step([5, 1], [4, 20], dk=8)
    want = kernel(step.cloned(), Rules())
    args = list(step.cloned())
    for i in range(3):
        args[i] = torch.stack([args[i], args[i]], dim=-1)[..., 0]  # no dense dimension
    table = torch.full((4, step.block_table.shape[1] + 3), -7, dtype=torch.int32)
    table[:2, :-3] = step.block_table
    args[8] = table[:2, : step.block_table.shape[1]]
    assert torch.equal(kernel(tuple(args), Rules()), want)


def test_tokens_of_no_sequence_are_zero() -> None:
    step = make_step([3, 1], [4, 20])
    args = list(step.cloned())
    args[6] = torch.tensor([0, 3, 3], dtype=torch.int32)  # the second sequence has no tokens
    args[7] = torch.tensor([7, 0], dtype=torch.int32)
    want = torch.ops.fxlm.paged_attention_reference(*[x.clone() for x in args], *Rules().args())
    got = kernel(tuple(args), Rules())
    assert got[0, 3:].abs().max() == 0
    torch.testing.assert_close(got, want)


def test_float64_goes_to_the_reference() -> None:
    step = make_step([3, 1], [4, 20])
    args = tuple(x.double() if x.is_floating_point() else x for x in step.cloned())
    got = kernel(args, Rules())
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, cases.naive_step(step, Rules()), atol=1e-12, rtol=1e-12)
    stored = cases.read_cache(args[3], keys=True)[:, step.slot_mapping]
    assert torch.equal(stored, args[1][0])


def join(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The blocks of two caches, of whatever type."""
    blocks = [x.view(torch.uint8) for x in (first, second)]
    return torch.cat(blocks).view(first.dtype)


def with_company(
    step: Step, args: tuple[torch.Tensor, ...], begin: int, end: int, other: Step
) -> tuple[torch.Tensor, ...]:
    """Tokens begin..end of a single sequence beside one decode, in one pair of caches."""
    blocks = args[3].shape[0]
    table = torch.zeros(2, step.block_table.shape[1], dtype=torch.int32)
    table[0] = step.block_table[0]
    table[1, : other.block_table.shape[1]] = other.block_table[0] + blocks
    new = zip(args[:3], (other.q, other.k, other.v), strict=True)
    return (
        *(torch.cat([ours[:, :, begin:end], theirs], 2) for ours, theirs in new),
        *(join(a, b) for a, b in zip(args[3:5], (other.k_cache, other.v_cache), strict=True)),
        torch.cat([args[5][begin:end], other.slot_mapping + blocks * args[3].shape[2]]),
        torch.tensor([0, end - begin, end - begin + 1], dtype=torch.int32),
        torch.tensor([end, int(other.seq_lens[0])], dtype=torch.int32),
        table,
    )


# over codes of whole vectors, and over whole tiles, few rows and many take different kernels
STORED = [
    *((dtype, dtype, 20) for dtype in TOLERANCE),
    (torch.bfloat16, torch.bfloat16, 64),
    *((dtype, codes, 32) for codes in CODED for dtype in (torch.float32, torch.bfloat16)),
]


@pytest.mark.parametrize("rules", [Rules(), Rules(window=45), Rules(chunk=100)])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, *CODED])
@pytest.mark.parametrize(("width", "block_size"), [(64, 16), (80, 32), (20, 64)])
def test_kernel_with_rows_of_several_blocks_and_splits(
    width: int, block_size: int, cache_dtype: torch.dtype, rules: Rules
) -> None:
    """Long prefills, of which tiles multiply many rows at once: NaN lies where no token does."""
    step = make_step(
        [310, 9, 150],
        [0, 700, 129],
        heads=6,
        kv_heads=2,
        dk=width,
        dv=width + 4,
        block_size=block_size,
        dtype=torch.bfloat16,
        cache_dtype=cache_dtype,
    )
    want = torch.ops.fxlm.paged_attention_reference(*step.cloned(), *rules.args())
    torch.testing.assert_close(kernel(step.cloned(), rules), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("dtype", "cache_dtype", "width"), STORED)
@pytest.mark.parametrize("window", [0, 100, 700])
@pytest.mark.parametrize("heads_and_kv", [(4, 2), (3, 3)])
def test_chunks_and_company_change_no_bit(
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    width: int,
    window: int,
    heads_and_kv: tuple[int, int],
) -> None:
    """A prompt of 600 whole, and the same in chunks beside another sequence."""
    heads, kv_heads = heads_and_kv
    shape = {"heads": heads, "kv_heads": kv_heads, "dk": width, "dtype": dtype}
    shape["cache_dtype"] = cache_dtype
    rules = Rules(window=window, sinks=torch.linspace(-1, 1, heads))
    step = make_step([600], [0], **shape)
    want = kernel(step.cloned(), rules)
    args = step.cloned()
    other = make_step([1], [300], seed=5, **shape)
    blocks = args[3].shape[0]
    begin = 0
    for size in (1, 255, 2, 130, 64, 147, 1):
        mixed = with_company(step, args, begin, begin + size, other)
        got = kernel(mixed, rules)
        args = (*args[:3], mixed[3][:blocks], mixed[4][:blocks], *args[5:])
        assert torch.equal(got[:, :size], want[:, begin : begin + size]), (begin, size)
        begin += size


def test_thread_count_changes_no_bit() -> None:
    step = make_step([1], [3000], heads=2, kv_heads=1)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(kernel(step.cloned(), Rules()))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (5, 10**6, "slot_mapping"),
        (6, 6, "query_start"),
        (7, 1, "seq_lens"),
        (7, 10**6, "seq_lens"),
        (8, 10**6, "block_table"),
        (8, -1, "block_table"),
    ],
)
def test_an_address_outside_of_the_cache_is_an_error(
    registered: str, index: int, value: int, message: str
) -> None:
    if registered == "reference":
        pytest.skip("checked by the kernels")
    args = make_step([3, 2], [4, 20]).cloned()
    args[index].view(-1)[1 if index != 8 else 0] = value
    with pytest.raises(RuntimeError, match=message):
        kernel(args, Rules())
