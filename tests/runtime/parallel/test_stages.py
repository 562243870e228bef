"""Layers cut over stages: the tokens of one rank, with several steps in flight."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from fxlm.compiler.errors import EngineDead, InvalidOption
from fxlm.models.tiny import write_checkpoint
from fxlm.runtime.check import generate
from fxlm.runtime.engine import Engine
from fxlm.runtime.parallel import build
from fxlm.runtime.parallel.build import ParallelWorker
from fxlm.runtime.sampling_params import SamplingParams
from tests.models.formats.test_compressed_tensors import write as write_quantized
from tests.runtime.parallel.test_engine import GIVEN, GREEDY, engine, ranks_of

SAMPLED = SamplingParams(
    temperature=0.8, seed=5, n=2, max_tokens=8, logprobs=2, repetition_penalty=1.2, ignore_eos=True
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


def worker_of(made: Engine) -> ParallelWorker:
    assert isinstance(made.worker, ParallelWorker)
    return made.worker


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"pipeline_parallel_size": 2}),
        ("gemma2", {"pipeline_parallel_size": 3}),
        (
            "mixtral",
            {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "sequence_parallel": True},
        ),
    ],
)
def test_tokens_are_those_of_one_rank(folder: Path, family: str, sizes: dict[str, Any]) -> None:
    model = write_checkpoint(family, folder / family, num_hidden_layers=4)
    alone = engine(model)
    cut = engine(model, **sizes)
    for params in (GREEDY, SAMPLED, GREEDY):  # at last by way of the prefix cache
        assert generate(cut, GIVEN, params) == generate(alone, GIVEN, params)
    ranks_of(cut).close()


def test_a_quantized_checkpoint(folder: Path) -> None:
    write_quantized(folder / "int4", "int4")
    expected = generate(engine(folder / "int4"), GIVEN, GREEDY)
    cut = engine(folder / "int4", pipeline_parallel_size=2)
    assert generate(cut, GIVEN, GREEDY) == expected
    ranks_of(cut).close()


def test_steps_fly_and_little_memory_preempts(folder: Path, monkeypatch: Any) -> None:
    model = write_checkpoint("llama", folder / "flying")
    alone = engine(model)
    cut = engine(model, pipeline_parallel_size=2, kv_cache_memory_bytes=48 << 10)
    worker = worker_of(cut)
    most: list[int] = []
    land = ParallelWorker.land

    def counted(self: ParallelWorker, rows: int, wants_logprobs: bool) -> Any:
        most.append(self.num_flying)
        return land(self, rows, wants_logprobs)

    monkeypatch.setattr(ParallelWorker, "land", counted)
    long = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    assert generate(cut, GIVEN, long) == generate(alone, GIVEN, long)
    assert max(most) == worker.depth == 2
    assert cut.stats().num_preemptions > 0
    assert worker.num_flying == 0
    ranks_of(cut).close()


def test_more_stages_than_layers_are_refused(folder: Path) -> None:
    model = write_checkpoint("llama", folder / "few")
    with pytest.raises(InvalidOption, match="2 layers cannot be cut into 3 stages"):
        engine(model, pipeline_parallel_size=3)


def test_heads_that_do_not_divide_are_refused_before_a_rank_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_checkpoint("llama", folder / "heads")
    monkeypatch.setattr(build, "start_ranks", lambda *args: pytest.fail("ranks were started"))
    with pytest.raises(InvalidOption, match="query heads cannot be shared out evenly"):
        engine(model, tensor_parallel_size=64)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_last_stage_is_lost(folder: Path, how: signal.Signals) -> None:
    model = write_checkpoint("llama", folder / f"lost{int(how)}")
    cut = engine(model, pipeline_parallel_size=2, distributed_timeout_seconds=2)
    os.kill(ranks_of(cut).pids[1], how)
    with pytest.raises(EngineDead, match="rank 1"):
        generate(cut, GIVEN, GREEDY)
    ranks_of(cut).close()
