"""The memory plan: weights, KV bytes, peak activations, and what fits; never by trial runs.

Weights, KV bytes and the costs of activations are read off the artifact, which got the last
from the graph (`fxlm.compiler.liveness`). Not here: allocating (`worker`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fxlm.compiler.artifact import Artifact, dtype_name
from fxlm.compiler.errors import InvalidOption, OutOfMemory
from fxlm.compiler.ops.kv_cache import is_coded
from fxlm.runtime import machine
from fxlm.runtime.options import EngineOptions
from fxlm.runtime.step import DEFAULT_SCORE_ROWS, WorkerSpec, most_draft_rows

# Interpreter, libraries and buffers of a step that no graph shows; measured, see bench/startup.py.
OVERHEAD_BYTES = 600 << 20
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """What an engine will use, each choice with its reason.

    Attributes:
        weights_bytes: prepared weights.
        kv_bytes_per_token: K and V of one token in all layers.
        kv_content: what the cache holds, in words.
        kv_bytes: of the whole cache.
        activation_bytes: peak of one step of ``spec.max_num_batched_tokens`` tokens, as the
            graph stands; compiled code fuses and needs less.
        available_bytes: memory that was free for planning.
        spec: sizes of the worker.
        draft_spec: of the draft model's worker, if one drafts; its weights and cache are in the
            numbers above.
        reasons: what was chosen and why, in order.
    """

    weights_bytes: int
    kv_bytes_per_token: int
    kv_content: str
    kv_bytes: int
    activation_bytes: int
    available_bytes: int
    spec: WorkerSpec
    reasons: tuple[tuple[str, str, str], ...]
    draft_spec: WorkerSpec | None = None

    def lines(self) -> list[str]:
        """The plan as text."""
        spec = self.spec
        rows = [
            ("weights", _mib(self.weights_bytes), ""),
            ("KV per token", f"{self.kv_bytes_per_token} bytes", self.kv_content),
            ("peak activations", _mib(self.activation_bytes),
             f"a step of {spec.max_num_batched_tokens} tokens, unfused (upper bound)"),
            *self.reasons,
        ]  # fmt: skip
        text = [f"{name:<26}{value:>18}   {why}".rstrip() for name, value, why in rows]
        tokens = (spec.num_blocks - 1) * spec.block_size
        text.append("fits: " + ", ".join(
            f"{max(1, min(tokens // length, spec.max_num_seqs))} x {length}"
            for length in _ladder(spec.max_model_len)
        ) + " (sequences x tokens of context)")  # fmt: skip
        return text


def plan_memory(
    artifact: Artifact, options: EngineOptions, draft: Artifact | None = None, share: int = 1
) -> MemoryPlan:
    """Plan an engine for an artifact, and for a draft model's beside it.

    Both models keep the same tokens in their caches, so these have the same number of blocks.

    Args:
        artifact: of the model, or of this rank's part of it.
        options: of the engine.
        draft: of the draft model.
        share: ranks that share this machine's memory (a GPU is a rank's alone).

    Raises:
        OutOfMemory: weights and one sequence of the context asked for do not fit.
        InvalidOption: ``max_model_len`` is beyond what the model was made for.
    """
    model = artifact.manifest["model"]
    block = int(model["block_size"])
    artifacts = [artifact] if draft is None else [artifact, draft]
    weights = sum(weight_bytes(item) for item in artifacts)
    per_token = sum(cache_bytes_per_token(item) for item in artifacts)
    cpu = model["device"] == "cpu"
    batched, why_batched = _tokens_per_step(model, options)
    drafted = options.speculative_config.most if options.speculative_config else 0
    rows = options.max_num_seqs + DEFAULT_SCORE_ROWS
    rows += most_draft_rows(options.max_num_seqs, batched, drafted)
    activations = max(activation_bytes(item, batched, rows) for item in artifacts)
    available, source = _available(cpu, share)
    longest, why_length = _context(model, options)
    budget, why_budget = _budget(options, available, source, weights + activations, per_token,
                                 longest, block)  # fmt: skip
    num_blocks = max(budget // (per_token * block), 0)
    longest, why_length = _fit_context(
        longest, why_length, (num_blocks - 1) * block, options, budget, per_token
    )
    spec = WorkerSpec(
        num_blocks=num_blocks, block_size=block, max_num_batched_tokens=batched,
        max_num_seqs=options.max_num_seqs, max_model_len=longest,
        vocab_size=int(model["vocab_size"]), max_drafts=drafted,
        taps={name: tuple(row) for name, row in artifact.manifest.get("taps", ())},
        steered=dict(artifact.manifest.get("steered", ())),
    )  # fmt: skip
    reasons = (
        *_draft_reasons(options, draft),
        ("KV cache", _mib(num_blocks * per_token * block), why_budget),
        ("context", f"{longest} tokens", why_length),
        ("tokens per step", str(batched), why_batched),
        ("sequences per step", str(options.max_num_seqs), ""),
    )  # fmt: skip
    return MemoryPlan(
        weights_bytes=weights, kv_bytes_per_token=per_token, activation_bytes=activations,
        kv_content=_content(artifact), kv_bytes=num_blocks * per_token * block,
        available_bytes=available, spec=spec, reasons=reasons,
        draft_spec=None if draft is None else _draft_spec(draft, spec, options),
    )  # fmt: skip


def weight_bytes(artifact: Artifact) -> int:
    """Bytes of the prepared weights."""
    return sum(spec.nbytes for spec in artifact.weights().values())


def cache_bytes_per_token(artifact: Artifact) -> int:
    """Bytes of K and V of one token in all layers."""
    return sum(cache.bytes_per_token for cache in artifact.caches())


def _draft_reasons(
    options: EngineOptions, draft: Artifact | None
) -> tuple[tuple[str, str, str], ...]:
    """What drafting takes, as lines of the plan."""
    config = options.speculative_config
    if config is None:
        return ()
    if draft is None:
        return (("drafts", f"{config.most} tokens", config.kind),)
    share = f"of the above are the draft's; its KV: {cache_bytes_per_token(draft)} bytes a token"
    return (
        ("drafts", f"{config.most} tokens", f"by {config.model}"),
        ("draft's weights", _mib(weight_bytes(draft)), share),
    )


def _draft_spec(draft: Artifact, target: WorkerSpec, options: EngineOptions) -> WorkerSpec:
    """Sizes of the draft's worker: the target's, within what the draft was made for."""
    model = draft.manifest["model"]
    assert options.speculative_config is not None
    asked = options.speculative_config.max_model_len or target.max_model_len
    made_for = int(model["max_position_embeddings"]) or target.max_model_len
    return replace(
        target,
        max_model_len=min(asked, made_for, target.max_model_len),
        max_num_batched_tokens=min(target.max_num_batched_tokens, int(model["max_tokens"])),
        max_score_rows=1,
        max_drafts=0,
    )


def _content(artifact: Artifact) -> str:
    """Element types of the caches, e.g. ``K and V of all layers, int8 and a scale a head``."""
    types = sorted({c.dtype for c in artifact.caches()}, key=str)
    names = [dtype_name(t) + (" and a scale a head" if is_coded(t) else "") for t in types]
    return f"K and V of all layers, {', '.join(names)}"


def _tokens_per_step(model: dict[str, Any], options: EngineOptions) -> tuple[int, str]:
    most = int(model["max_tokens"])
    asked = options.max_num_batched_tokens
    if asked is not None and asked > most:
        raise InvalidOption(
            "max_num_batched_tokens", asked, f"the graph of this model takes {most} at most"
        )
    usual = 512 if model["device"] == "cpu" else 2048
    if asked is not None:
        return asked, "asked for"
    return min(usual, most), f"default on {model['device']}" if usual <= most else "model's bound"


def _available(cpu: bool, share: int) -> tuple[int, str]:
    if cpu:
        limit, source = machine.memory_limit_bytes()
        shared = f" (a rank's share of {share})" if share > 1 else ""
        return min(machine.memory_available_bytes(), limit) // share, f"{source} memory{shared}"
    free, _total = torch.cuda.mem_get_info()
    return free, "GPU memory"


def _context(model: dict[str, Any], options: EngineOptions) -> tuple[int, str]:
    made_for = int(model["max_position_embeddings"]) or 1 << 17
    asked = options.max_model_len
    if asked is None:
        return made_for, "what the model was made for"
    if asked > made_for:
        raise InvalidOption(
            "max_model_len", asked, f"the model was made for {made_for} tokens at most"
        )
    return asked, "asked for"


def _budget(
    options: EngineOptions, available: int, source: str, fixed: int, per_token: int,
    longest: int, block: int,
) -> tuple[int, str]:  # fmt: skip
    """Bytes for the KV cache, and why."""
    if options.kv_cache_memory_bytes is not None:
        return options.kv_cache_memory_bytes, "asked for"
    free = int(available * options.memory_fraction) - fixed - OVERHEAD_BYTES
    # More than all sequences at full length can use would never be touched.
    most = (options.max_num_seqs * (-(-longest // block)) + 1) * block * per_token
    if most <= free:
        return most, f"all {options.max_num_seqs} sequences at full length"
    if free <= 0:
        raise OutOfMemory(
            f"weights and activations need {_mib(fixed)} and the process {_mib(OVERHEAD_BYTES)}, "
            f"but only {_mib(int(available * options.memory_fraction))} of {source} may be used "
            f"({_mib(available)} free x memory_fraction {options.memory_fraction}): free memory, "
            "raise --memory-fraction or take a smaller model"
        )
    return free, f"{options.memory_fraction:g} of {_mib(available)} free {source}, less the rest"


def _fit_context(
    longest: int, why: str, tokens: int, options: EngineOptions, budget: int, per_token: int
) -> tuple[int, str]:
    """Shorten the context to the KV cache if nobody asked for a length; else refuse."""
    if longest <= tokens:
        return longest, why
    if options.max_model_len is not None or tokens < 2:
        raise OutOfMemory(
            f"one sequence of {longest} tokens needs {_mib(longest * per_token)} of KV memory and "
            f"{_mib(budget)} are planned ({max(tokens, 0)} tokens): lower --max-model-len or raise "
            "--kv-cache-memory-bytes"
        )
    return tokens, f"what the KV cache holds; the model was made for {longest}"


def activation_bytes(artifact: Artifact, num_tokens: int, num_rows: int) -> int:
    """Peak bytes of one step's activations, from the costs that compiling worked out."""
    costs = artifact.manifest["activations"]
    return int(costs["per_token"]) * num_tokens + int(costs["per_row"]) * num_rows


def _ladder(longest: int) -> list[int]:
    """Context lengths to show: powers of two up to the longest."""
    lengths = [n for n in (512, 2048, 8192, 32768, 131072) if n < longest]
    return [*lengths, longest]


def _mib(count: int) -> str:
    return f"{count / MIB:,.0f} MiB"
