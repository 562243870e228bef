"""Speculative decoding is lossless: the tokens of plain decoding, whoever drafts, float32."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fxlm import LLM, SamplingParams
from fxlm.compiler.errors import InvalidOption
from fxlm.models.tiny import write_checkpoint
from fxlm.runtime.check import reference_model
from fxlm.runtime.drafters.draft_model import ModelDrafter
from fxlm.runtime.drafting import check_draft
from fxlm.runtime.options import from_mapping
from tests.compiler.ops.cases import Row
from tests.compiler.ops.test_sample import filtered

LIST = "The list 1 2 3 4 1 2 3 4 1 2"
PROMPTS = [
    LIST,
    "def add(a, b):",
    "import os\n",
    "count 5, 6, 7,",
    "def add(a, b):",
    "a b c a b c a b c a b",
]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=40, prompt_logprobs=1),
    SamplingParams(temperature=0.0, max_tokens=40, repetition_penalty=1.1, logprobs=2),
    SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=30, min_tokens=8),
    SamplingParams(temperature=1.0, top_k=20, seed=2, n=3, max_tokens=20, frequency_penalty=0.5),
    SamplingParams(temperature=0.0, max_tokens=40, stop=["\n\n", "b)"], logit_bias={5: -3.0}),
    SamplingParams(temperature=1.0, seed=4, max_tokens=24, ignore_eos=True),
]
DRAFTERS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram", "prompt_lookup_min": 1},
    "suffix": {"method": "suffix", "num_speculative_tokens": 6},
    "draft_model": {"method": "draft_model", "model": "bundled-draft"},
    "custom_class": {"method": "custom_class", "model": f"{__name__}.Guesser"},
}
ROOMY: dict[str, Any] = {}
# five prompts at once, 8 blocks of 16 tokens, prompts of up to 16 tokens a step
TIGHT = {"max_num_seqs": 5, "num_blocks": 9, "max_num_batched_tokens": 16}
# bytes: layers x kv heads x (key + value) x 4 x 16 tokens
BLOCK, DRAFT_BLOCK = 5 * 2 * 128 * 4 * 16, 3 * 1 * 64 * 4 * 16


class Guesser:
    """Drafts the last tokens again: right now and then."""

    def __init__(self, config: Any, spec: Any) -> None:
        assert (config.most, spec.max_drafts) == (4, 4)

    def propose(self, sequences: list[Any], limits: list[int]) -> list[list[int]]:
        return [s.token_ids[-limit:] for s, limit in zip(sequences, limits, strict=True)]


def make(drafter: dict[str, Any] | None, model: str = "bundled", **options: Any) -> LLM:
    config = None if drafter is None else {"adaptive": False, **drafter}
    if "num_blocks" in options:
        draft = DRAFT_BLOCK if drafter == DRAFTERS["draft_model"] else 0
        options["kv_cache_memory_bytes"] = options.pop("num_blocks") * (BLOCK + draft)
    return LLM(
        model, dtype="float32", enforce_eager=True, max_model_len=128, threads=1,
        speculative_config=config, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def plain() -> list[Any]:
    llm = make(None)
    return facts(llm)


def facts(llm: LLM) -> list[Any]:
    """Everything that a user sees of the outputs."""
    found: list[Any] = []
    for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False):
        found.append(logprobs(output.prompt_logprobs))
        for item in output.outputs:
            reason = item.finish_reason, item.stop_reason
            found.append((item.text, item.token_ids, reason, logprobs(item.logprobs)))
    return found


def logprobs(given: Any) -> Any:
    return given and [d and {t: (round(v.logprob, 3), v.rank) for t, v in d.items()} for d in given]


@pytest.mark.parametrize("sizes", [ROOMY, TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_outputs_equal_plain_decoding(
    drafter: str, sizes: dict[str, Any], plain: list[Any]
) -> None:
    llm = make(DRAFTERS[drafter], **sizes)
    assert facts(llm) == plain
    assert facts(llm) == plain  # and once more, through the prefix caches
    stats = llm.engine.stats()
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    assert sum(stats.accepted_per_position) == stats.num_accepted_tokens
    assert (stats.num_preemptions > 0) == (sizes is TIGHT)
    assert llm.engine.speculator is not None
    assert llm.engine.speculator.drafter is not None


def test_a_draft_that_is_short_of_blocks_keeps_its_books() -> None:
    """Guesses of a preempted sequence go from what penalties count, and from digests."""
    llm = LLM(
        "bundled", dtype="float32", enforce_eager=True, max_model_len=320, threads=1,
        max_num_seqs=8, kv_cache_memory_bytes=2_600_000,
        speculative_config={**DRAFTERS["draft_model"], "num_speculative_tokens": 40,
                            "adaptive": False},
    )  # fmt: skip
    speculator = llm.engine.speculator
    assert speculator is not None
    drafter = speculator.drafter
    assert isinstance(drafter, ModelDrafter)
    scheduler = drafter.scheduler
    size, commit = scheduler.spec.block_size, scheduler.commit_blocks

    def check(sequence: Any, start: int, end: int) -> None:
        """Blocks are known by the tokens that are in them, and only these are counted."""
        assert sequence.adjust is None or sequence.adjust.num_seen <= len(sequence.token_ids)
        digest = scheduler.pool.root(sequence.request.cache_salt)
        for number in range(end // size):
            tokens = sequence.token_ids[number * size : (number + 1) * size]
            digest = scheduler.pool.digest(digest, tokens)
            assert scheduler._digest(sequence, number) == digest
        commit(sequence, start, end)

    scheduler.commit_blocks = check  # type: ignore[method-assign]
    preempted: list[Any] = []
    preempt = scheduler._preempt
    scheduler._preempt = lambda plan, s: preempted.append(s) or preempt(plan, s)  # type: ignore[method-assign, func-returns-value]
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True, repetition_penalty=1.2)
    llm.generate([f"# {i}\ndef add(a, b):" for i in range(8)], params, use_tqdm=False)
    assert preempted
    assert speculator.drafter is drafter, "it was switched off"


def test_prefix_caching_is_off_for_the_draft_as_well() -> None:
    llm = make(DRAFTERS["draft_model"], enable_prefix_caching=False)
    assert llm.engine.speculator is not None
    drafter = llm.engine.speculator.drafter
    assert isinstance(drafter, ModelDrafter)
    assert not drafter.scheduler.pool.enable_caching


@pytest.mark.parametrize("model_type", ["gemma2", "mixtral", "gpt2", "qwen3"])
def test_any_model_verifies(model_type: str, tmp_path: Path) -> None:
    path = str(write_checkpoint(model_type, tmp_path / "model"))
    prompts = [[3, 17, 99, 4], [5] * 12, [8, 9, 10] * 7]
    options = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True, detokenize=False)
    tokens = []
    for drafter in (None, DRAFTERS["ngram"]):
        llm = make(drafter, path, skip_tokenizer_init=True)
        tokens.append([o.outputs[0].token_ids for o in llm.generate(prompts, options)])
    assert tokens[0] == tokens[1]
    assert llm.engine.stats().num_accepted_tokens > 0


VOCAB = 8
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two tiny models over eight tokens that have little in common."""
    root = tmp_path_factory.mktemp("pair")
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": 128, "num_hidden_layers": 1}
    target = write_checkpoint("llama", root / "target", seed=1, **sizes)
    return str(target), str(write_checkpoint("llama", root / "draft", seed=2, **sizes))


@pytest.mark.parametrize("method", ["draft_model", "custom_class"])
@pytest.mark.parametrize(
    "filters",
    [
        {"temperature": temperature, **more}
        for temperature in (0.7, 1.0)
        for more in ({}, {"top_k": 4}, {"top_p": 0.9})
    ],
    ids=str,
)
def test_draws_follow_the_models_distribution(
    method: str, filters: dict[str, Any], pair: tuple[str, str]
) -> None:
    """Chi-square over the first three tokens of 2,000 requests, against transformers."""
    count, length = 2000, 3
    model = pair[1] if method == "draft_model" else DRAFTERS[method]["model"]
    llm = make({"method": method, "model": model}, pair[0], skip_tokenizer_init=True)
    params = [
        SamplingParams(
            **filters, seed=seed, max_tokens=length, ignore_eos=True, detokenize=False
        )
        for seed in range(count)
    ]  # fmt: skip
    outputs = llm.generate([PROMPT] * count, params, use_tqdm=False)
    seen = Counter(tuple(o.outputs[0].token_ids) for o in outputs)
    expected = joint(pair[0], Row(**filters), length)
    assert set(seen) <= set(expected)
    assert llm.engine.stats().num_accepted_tokens > count / 10
    rare = sum(p for p in expected.values() if p * count < 5)
    cells = [(seen[t], p * count) for t, p in expected.items() if p * count >= 5]
    cells.append((count - sum(n for n, _ in cells), rare * count))
    chi = sum((n - mean) ** 2 / mean for n, mean in cells if mean > 0)
    freedom = len(cells) - 1
    assert freedom > 10
    assert chi < freedom + 5 * math.sqrt(2 * freedom)


def joint(model: str, row: Row, length: int) -> dict[tuple[int, ...], float]:
    """Probability of each way to go on, by the model of transformers."""
    from fxlm.models.checkpoint import open_checkpoint

    reference = reference_model(open_checkpoint(model), torch.float32)
    known: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        texts = list(known)
        with torch.inference_mode():
            logits = reference(torch.tensor([PROMPT + list(t) for t in texts])).logits[:, -1]
        longer: dict[tuple[int, ...], float] = {}
        for text, line in zip(texts, logits.double(), strict=True):
            for token, p in enumerate(filtered(line, row).tolist()):
                if p > 0:
                    longer[*text, token] = known[text] * p
        known = longer
    return known


def test_a_draft_with_another_vocabulary_is_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(InvalidOption, match=r"a vocabulary of 4096 tokens and .* one of 8"):
        make(DRAFTERS["draft_model"], pair[0], skip_tokenizer_init=True)


def test_another_vocabulary_is_refused_before_anything_is_compiled(pair: tuple[str, str]) -> None:
    given = {"model": pair[0], "speculative_config": DRAFTERS["draft_model"]}
    with pytest.raises(InvalidOption, match=r"a vocabulary of 4096 tokens and .* one of 8"):
        check_draft(from_mapping(given))


def test_the_plan_holds_both_models() -> None:
    alone, both = make(None), make(DRAFTERS["draft_model"])
    draft = both.plan.draft_spec
    assert draft is not None
    assert draft.num_blocks == both.plan.spec.num_blocks
    assert both.plan.weights_bytes > alone.plan.weights_bytes
    assert both.plan.kv_bytes_per_token > alone.plan.kv_bytes_per_token
    assert any("by bundled-draft" in line for line in both.plan.lines())
