"""The sampler: the reference against plain Python, the CPU kernel against the reference."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fxlm.compiler.ops import reference
from tests.compiler.ops.cases import Row, sample_args

INFINITY = float("inf")
BOTH = pytest.mark.parametrize("which", ["sample", "sample_reference"])


def run(which: str, logits: Tensor, rows: list[Row], **options: Any) -> tuple[Tensor, ...]:
    return tuple(getattr(torch.ops.fxlm, which)(*sample_args(logits, rows, **options)))


def normal(rows: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def naive_token(logits: list[float], row: Row) -> int:
    """What the interface says, in plain Python floats."""
    for token, count, bias in row.adjust:
        if not 0 <= token < len(logits):
            continue
        x = logits[token]
        if count >= 0:
            x = x / row.repetition if x > 0 else x * row.repetition
        x -= row.frequency * max(count, 0) + row.presence * (count > 0)
        logits[token] = x + bias
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if row.temperature == 0:
        return order[0]
    best = logits[order[0]]
    weights = [math.exp((logits[i] - best) / row.temperature) for i in order]
    kept = sum(w >= row.min_p for w in weights)
    if row.top_k > 0:
        kept = min(kept, row.top_k)
    weights = weights[:kept]
    goal, mass, kept = row.top_p * sum(weights), 0.0, 0
    while kept < len(weights) and (mass < goal or kept == 0):
        mass += weights[kept]
        kept += 1
    times = {
        i: -math.log1p(-naive_uniform(row.seed, row.counter, i)) / weight
        for i, weight in zip(order, weights[:kept], strict=False)
        if weight > 0
    }
    return min(times, key=times.__getitem__)


def naive_uniform(seed: int, counter: int, token: int) -> float:
    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    stream = mix((mix(seed % 2**64) + counter) % 2**64)
    return (mix((stream + token) % 2**64) >> 11) / 2**53


def random_row(rng: random.Random, vocabulary: int) -> Row:
    ids = rng.sample(range(-2, vocabulary + 2), rng.choice([0, 0, 5]))
    return Row(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.7]),
        top_p=rng.choice([1.0, 1.0, 0.9, 0.3, 0.0]),
        min_p=rng.choice([0.0, 0.0, 0.05, 0.5]),
        repetition=rng.choice([1.0, 1.3]),
        presence=rng.choice([0.0, 0.7]),
        frequency=rng.choice([0.0, -0.4]),
        top_k=rng.choice([0, 0, 1, 5, 40, vocabulary + 7]),
        seed=rng.randrange(-(2**63), 2**63),
        counter=rng.randrange(2**20),
        adjust=[(i, rng.randrange(-1, 4), rng.choice([0.0, -INFINITY, 2.5])) for i in ids],
    )


def test_uniform_equals_plain_integers() -> None:
    cases = [(0, 0, 0), (1, 0, 7), (0, 1, 0), (-1, 5, 9), (2**63 - 1, 2**40, 3), (-(2**63), 3, 1)]
    columns = (torch.tensor(column) for column in zip(*cases, strict=True))
    assert reference.uniform(*columns).tolist() == [naive_uniform(*case) for case in cases]


@BOTH
def test_tokens_equal_plain_python(which: str) -> None:
    rng = random.Random(0)
    rows = [random_row(rng, 97) for _ in range(400)]
    logits = normal(len(rows), 97)
    tokens = run(which, logits, rows)[0].tolist()
    wrong = [i for i, row in enumerate(rows) if tokens[i] != naive_token(logits[i].tolist(), row)]
    assert len(wrong) <= 1, wrong  # a draw may fall on a boundary that float32 shifts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocabulary", "scale"), [(1, 1.0), (13, 1.0), (5003, 0.01), (40000, 4.0)])
def test_kernel_equals_reference(dtype: torch.dtype, vocabulary: int, scale: float) -> None:
    rng = random.Random(vocabulary)
    count = 60
    rows = [random_row(rng, vocabulary) for _ in range(count)] if vocabulary > 4 else []
    rows = rows or [Row(temperature=1.0, num_logprobs=0)]
    logits = normal(len(rows), vocabulary, scale=scale).to(dtype)
    got, want = (run(which, logits, rows)[0] for which in ("sample", "sample_reference"))
    # Flat float32 logits: neighbours in the order are equal but for rounding.
    assert int((got != want).sum()) <= (2 if scale < 0.1 else 1)


@BOTH
def test_greedy_takes_the_lowest_of_equal_logits(which: str) -> None:
    logits = torch.zeros(3, 4099)
    logits[0, [70, 4098]] = 2.0
    logits[1, 4098] = 2.0
    logits[2] = -0.0
    logits[2, 5] = 0.0
    assert run(which, logits, [Row()] * 3)[0].tolist() == [70, 4098, 0]


@BOTH
def test_rows_without_a_number_give_token_zero(which: str) -> None:
    nan = float("nan")
    logits = torch.full((6, 100), nan)
    logits[1:3] = -INFINITY
    logits[3, 7] = 1.0
    logits[4, 9] = INFINITY
    logits[5] = INFINITY
    rows = [Row(temperature=t, num_logprobs=2) for t in (0, 0, 1, 1, 1, 0)]
    tokens, logprobs, _, _ = run(which, logits, rows)
    assert tokens.tolist() == [0, 0, 0, 7, 9, 0]
    assert logprobs[3, 0] == 0
    assert logprobs[:3, 0].tolist() == [-INFINITY] * 3
    assert not logprobs.isnan().any()


@BOTH
def test_strange_parameters_do_no_harm(which: str) -> None:
    nan = float("nan")
    logits = normal(6, 300)
    best = logits.argmax(-1).tolist()
    rows = [
        Row(temperature=nan),
        Row(temperature=1e-30),
        Row(temperature=1.0, top_p=0.0),
        Row(temperature=1.0, min_p=1.0),
        Row(temperature=1.0, top_p=-1.0, top_k=10**15),
        Row(temperature=1.0, top_k=1),
    ]
    assert run(which, logits, rows)[0].tolist() == best


@BOTH
def test_adjustments(which: str) -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, -1.0]]).repeat(6, 1)
    rows = [
        Row(adjust=[(2, -1, -INFINITY), (99, 1, 5.0), (-1, 1, 5.0)]),
        Row(repetition=2.0, adjust=[(2, 0, 0.0)]),  # in the prompt alone
        Row(presence=5.0, frequency=1.0, adjust=[(2, 0, 0.0)]),
        Row(presence=1.5, adjust=[(2, 3, 0.0)]),
        Row(frequency=0.4, adjust=[(2, 3, 0.0)]),
        Row(repetition=9.0, presence=9.0, adjust=[(2, -1, 0.0)]),
    ]
    assert run(which, logits, rows)[0].tolist() == [1, 1, 2, 1, 1, 2]


@BOTH
def test_no_entries_at_all(which: str) -> None:
    args = list(sample_args(normal(2, 50), [Row(), Row(temperature=1.0)]))
    for i in (4, 5, 6):
        args[i] = args[i][:0]
    tokens = getattr(torch.ops.fxlm, which)(*args)[0]
    assert tokens[0] == normal(2, 50)[0].argmax()


@pytest.mark.parametrize(
    "row",
    [
        Row(temperature=0.8),
        Row(temperature=1.0, top_k=4),
        Row(temperature=1.0, top_p=0.8),
        Row(temperature=1.5, min_p=0.2),
        Row(temperature=1.2, top_k=9, top_p=0.9, min_p=0.02),
    ],
)
def test_draws_follow_the_distribution(row: Row) -> None:
    draws, vocabulary = 20000, 24
    logits = normal(1, vocabulary, seed=3, scale=1.5)
    rows = [Row(**{**_fields(row), "seed": 7, "counter": i}) for i in range(draws)]
    tokens = run("sample", logits.expand(draws, -1), rows)[0]
    observed = torch.bincount(tokens, minlength=vocabulary).double()
    expected = filtered(logits[0].double(), row) * draws
    assert observed[expected == 0].sum() == 0
    used = expected > 0
    chi = ((observed - expected)[used] ** 2 / expected[used]).sum().item()
    freedom = int(used.sum()) - 1
    assert chi < freedom + 5 * math.sqrt(2 * freedom)


def _fields(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__dataclass_fields__}


def filtered(logits: Tensor, row: Row) -> Tensor:
    """The distribution that is left, [V]."""
    p = torch.softmax(logits / row.temperature, 0)
    p = torch.where(p >= row.min_p * p.max(), p, 0.0)
    order = p.argsort(descending=True)
    if row.top_k:
        p[order[row.top_k :]] = 0
    p /= p.sum()
    cumulative = p[order].cumsum(0)
    p[order[1:][cumulative[:-1] >= row.top_p]] = 0
    return p / p.sum()


@BOTH
def test_top_k_of_exactly_the_likely_tokens_keeps_them_all(which: str) -> None:
    logits = torch.tensor([[-1.0, 0.0, 0.0, -50.0, -60.0]]).expand(200, -1)
    rows = [Row(temperature=1.0, top_k=3, counter=i) for i in range(200)]
    assert set(run(which, logits, rows)[0].tolist()) == {0, 1, 2}


@BOTH
def test_similar_logits_draw_the_same_token_mostly(which: str) -> None:
    """At least (1 - d) / (1 + d) of the draws agree, d the distance in total variation."""
    draws, vocabulary = 4000, 50
    one = normal(1, vocabulary, seed=4, scale=1.0)
    other = one + normal(1, vocabulary, seed=5, scale=0.3)
    rows = [Row(temperature=1.0, seed=11, counter=i) for i in range(draws)]
    first, second = (run(which, x.expand(draws, -1), rows)[0] for x in (one, other))
    distance = float((torch.softmax(one, -1) - torch.softmax(other, -1)).abs().sum()) / 2
    assert 0.05 < distance < 0.3
    agreed = float((first == second).double().mean())
    assert agreed > (1 - distance) / (1 + distance) - 0.02


def test_a_draw_depends_on_its_row_alone() -> None:
    rng = random.Random(1)
    rows = [random_row(rng, 3000) for _ in range(40)]
    logits = normal(40, 3000)
    together = run("sample", logits, rows)[0]
    for i in range(0, 40, 3):
        assert run("sample", logits[i : i + 1], rows[i : i + 1])[0] == together[i]
    back = run("sample", logits.flip(0), rows[::-1])[0].flip(0)
    assert torch.equal(back, together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [5, 19, 3001])
def test_logprobs(dtype: torch.dtype, vocabulary: int) -> None:
    logits = normal(6, vocabulary).to(dtype)
    logits[0, 1] = float("nan")
    rows = [
        Row(num_logprobs=20),
        Row(num_logprobs=0),
        Row(num_logprobs=-1),
        Row(num_logprobs=5, target=3),
        Row(num_logprobs=4, temperature=1.0, adjust=[(2, 1, 50.0)]),
        Row(num_logprobs=1, target=vocabulary + 5),
    ]
    got, want = (run(which, logits, rows) for which in ("sample", "sample_reference"))
    exact = torch.log_softmax(logits.double().nan_to_num(-INFINITY), -1)
    assert got[0][3] == 3
    assert got[0][4] == 2
    for i, row in enumerate(rows):
        columns = min(row.num_logprobs, vocabulary) + 1
        if row.num_logprobs < 0:
            continue
        for a, b in zip(got[1:3], want[1:3], strict=True):
            torch.testing.assert_close(a[i, :columns], b[i, :columns])
        assert got[3][i] == want[3][i]
        if i < 5:
            ids = got[2][i, :columns]
            torch.testing.assert_close(
                got[1][i, :columns].double(), exact[i, ids], atol=1e-5, rtol=0
            )
            assert got[3][i] == 1 + (exact[i] > exact[i, ids[0]]).sum()
            assert torch.equal(exact[i, ids[1:]], exact[i].sort(descending=True)[0][: columns - 1])
    assert got[1][5, 0] == -INFINITY


def test_float64_and_strided_logits_go_to_the_reference() -> None:
    logits, row = normal(2, 50), Row(num_logprobs=3)
    want = run("sample", logits, [row] * 2)
    for other in (logits.double(), logits.t().contiguous().t()):
        got = run("sample", other, [row] * 2)
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1][:, :4], want[1][:, :4])


def test_rows_of_a_wider_buffer() -> None:
    logits = normal(4, 128)
    want = run("sample", logits[:, :100].contiguous(), [Row(temperature=1.0)] * 4)
    assert torch.equal(run("sample", logits[:, :100], [Row(temperature=1.0)] * 4)[0], want[0])


def test_no_rows() -> None:
    args = sample_args(normal(0, 64), [Row()])
    empty = (args[0], args[1][:0], args[2][:0], args[3][:1], *args[4:])
    assert [x.shape[0] for x in torch.ops.fxlm.sample(*empty)] == [0, 0, 0, 0]


def test_wrong_sizes_are_an_error(registered: str) -> None:
    if registered == "reference":
        pytest.skip("checked by the kernels")
    args = list(sample_args(normal(2, 64), [Row(), Row()]))
    args[1] = args[1][:1]
    with pytest.raises(RuntimeError, match="sizes differ"):
        torch.ops.fxlm.sample(*args)
