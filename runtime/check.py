"""Check a checkpoint: our tokens and log-probabilities against transformers' own.

Greedy tokens must equal `generate` in float32: the same mathematics, so the same choice at
every step. Below float32 roundings differ, so log-probabilities are held against a float32
run of transformers, next to the error that transformers itself makes in that dtype. Not here:
timing (``bench/``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fxlm.models import compat
from fxlm.models.checkpoint import Checkpoint, open_checkpoint
from fxlm.runtime.engine import Engine
from fxlm.runtime.messages import Output
from fxlm.runtime.options import EngineOptions
from fxlm.runtime.request import Request
from fxlm.runtime.sampling_params import SamplingParams
from fxlm.runtime.worker import build_engine

PROMPT_LENGTHS = (1, 7, 19, 33)
# Largest error of a log-probability in bfloat16 against float32 that counts as rounding, as a
# multiple of the error transformers makes itself, and never less than the floor.
TIMES_REFERENCE = 2.0
FLOOR = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCheck:
    """Greedy tokens of every prompt, ours and transformers'.

    Attributes:
        ours, theirs: generated ids per prompt.
        margin: smallest gap between the two best logits of transformers where the first
            difference of a prompt stands; 0 if there is none.
    """

    ours: list[list[int]]
    theirs: list[list[int]]
    margin: float

    @property
    def num_equal(self) -> int:
        """Prompts whose tokens are all equal."""
        return sum(a == b for a, b in zip(self.ours, self.theirs, strict=True))

    @property
    def equal(self) -> bool:
        """Whether all are."""
        return self.num_equal == len(self.ours)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobCheck:
    """Errors of the prompts' token log-probabilities against float32, largest of all.

    Attributes:
        ours: of our run in ``dtype``.
        theirs: of transformers in the same dtype.
    """

    dtype: str
    ours: float
    theirs: float

    @property
    def within(self) -> bool:
        """Whether ours is rounding."""
        return self.ours <= max(TIMES_REFERENCE * self.theirs, FLOOR)


def prompts(
    vocab_size: int, context: int, lengths: Sequence[int] = PROMPT_LENGTHS
) -> list[list[int]]:
    """Fixed pseudo-random prompts of these lengths, ids from 3 up (below are special ones)."""
    generator = torch.Generator().manual_seed(1234)
    low = min(3, vocab_size - 1)
    return [
        torch.randint(low, vocab_size, (min(n, context // 2),), generator=generator).tolist()
        for n in lengths
    ]


def check_tokens(options: EngineOptions, *, max_tokens: int = 12) -> TokenCheck:
    """Compare greedy tokens in float32.

    Args:
        options: of the engine; dtype and prefix caching are set here.
        max_tokens: generated per prompt, end tokens ignored.
    """
    checkpoint = open_checkpoint(options.model, options.revision, options.trust_remote_code)
    engine, _, _ = build_engine(replace(options, dtype="float32"))
    given = prompts(engine.spec.vocab_size, engine.spec.max_model_len - max_tokens)
    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    ours = generate(engine, given, greedy)
    model = reference_model(checkpoint, torch.float32)
    theirs = [_generate_reference(model, prompt, max_tokens) for prompt in given]
    margins = [
        _margin(model, p, a, b) for p, a, b in zip(given, ours, theirs, strict=True) if a != b
    ]
    return TokenCheck(ours=ours, theirs=theirs, margin=min(margins, default=0.0))


def check_logprobs(options: EngineOptions, dtype: str = "bfloat16") -> LogprobCheck:
    """Compare log-probabilities of prompt tokens in ``dtype`` with float32."""
    checkpoint = open_checkpoint(options.model, options.revision, options.trust_remote_code)
    engine, _, _ = build_engine(replace(options, dtype=dtype))
    given = [
        p for p in prompts(engine.spec.vocab_size, engine.spec.max_model_len - 1) if len(p) > 1
    ]
    score = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    outputs = run(engine, [_request(i, p, score) for i, p in enumerate(given)])
    ours = []
    for index in range(len(given)):
        found = [o.prompt_logprobs for o in outputs[str(index)] if o.prompt_logprobs]
        ours.append(torch.tensor([row[0][1] for row in found[0]]))
    exact = _reference_logprobs(checkpoint, torch.float32, given)
    rounded = _reference_logprobs(checkpoint, getattr(torch, dtype), given)
    return LogprobCheck(dtype=dtype, ours=_largest(ours, exact), theirs=_largest(rounded, exact))


def generate(
    engine: Engine, given: Sequence[Sequence[int]], params: SamplingParams
) -> list[list[int]]:
    """Tokens for each prompt, all submitted at once."""
    outputs = run(engine, [_request(i, p, params) for i, p in enumerate(given)])
    return [[t for o in outputs[str(i)] for t in o.token_ids] for i in range(len(given))]


def run(engine: Engine, requests: Sequence[Request]) -> dict[str, list[Output]]:
    """Step the engine until all requests are finished; outputs by request id, in order."""
    collected: dict[str, list[Output]] = {r.request_id: [] for r in requests}
    for request in requests:
        engine.add_request(request)
    while engine.has_unfinished():
        for output in engine.step():
            collected[output.request_id].append(output)
            assert output.finish_reason != "error", output.message
    return collected


def reference_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Transformers' own model, with its own attention."""
    from transformers import AutoModelForCausalLM

    compat.quiet()
    model = AutoModelForCausalLM.from_pretrained(
        str(checkpoint.path), dtype=dtype, trust_remote_code=checkpoint.trust_remote_code
    )
    return model.eval()


@torch.inference_mode()
def _generate_reference(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens,
        min_new_tokens=max_tokens, do_sample=False, num_beams=1, eos_token_id=None,
        pad_token_id=0, repetition_penalty=1.0, use_cache=True,
    )  # fmt: skip
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@torch.inference_mode()
def _margin(model: Any, prompt: list[int], ours: list[int], theirs: list[int]) -> float:
    """Gap of the two best logits where two outputs first differ."""
    place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    logits = model(torch.tensor([prompt + theirs[:place]]), use_cache=False).logits[0, -1]
    best = logits.float().topk(2).values
    return float(best[0] - best[1])


@torch.inference_mode()
def _reference_logprobs(
    checkpoint: Checkpoint, dtype: torch.dtype, given: Sequence[list[int]]
) -> list[torch.Tensor]:
    model = reference_model(checkpoint, dtype)
    found = []
    for prompt in given:
        ids = torch.tensor([prompt])
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        logprobs = logits.log_softmax(-1)
        found.append(logprobs.gather(1, ids[0, 1:, None])[:, 0])
    return found


def _largest(values: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    return max(float((v - e).abs().max()) for v, e in zip(values, exact, strict=True))


def _request(index: int, prompt: Sequence[int], params: SamplingParams) -> Request:
    return Request(request_id=str(index), prompt_token_ids=list(prompt), params=params)


def evaluate(checkpoint_dir: str | Path, *, compiled: bool = True) -> dict[str, Any]:
    """One row of the coverage table: stages reached and the reason of the first failure.

    Returns:
        ``captured``, ``compiled``, ``tokens_equal`` (bool each), ``reason`` (empty if all).
    """
    row: dict[str, Any] = {
        "captured": False, "compiled": False, "tokens_equal": False, "reason": "",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as cache:
        # Compiled first: it shows both. Only a failure needs the interpreter, to tell where.
        for eager in (False, True) if compiled else (True,):
            result, reason = _try_tokens(str(checkpoint_dir), cache, eager)
            row["reason"] = row["reason"] or reason
            if result is not None:
                row["captured"] = True
                row["compiled"] = not eager
                row["tokens_equal"] = result.equal
                break
    return row


def _try_tokens(model: str, cache: str, eager: bool) -> tuple[TokenCheck | None, str]:
    """Compare tokens in one way of running; the result or nothing, and what went wrong."""
    from fxlm.compiler.errors import FxlmError

    way = "interpreted" if eager else "compiled"
    options = EngineOptions(
        model=model, enforce_eager=eager, cache_dir=cache, max_num_seqs=8,
        max_num_batched_tokens=32, kv_cache_memory_bytes=64 << 20,
    )  # fmt: skip
    try:
        result = check_tokens(options)
    except (FxlmError, RuntimeError, AssertionError, ValueError, TypeError) as error:
        return None, f"{way}: {type(error).__name__}: {error}".splitlines()[0][:300]
    if result.equal:
        return result, ""
    return result, (
        f"{way}: {result.num_equal} of {len(result.ours)} prompts equal, logit margin at the "
        f"first difference {result.margin:.2e}"
    )
