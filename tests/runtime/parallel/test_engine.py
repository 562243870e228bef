"""An engine over ranks in processes of their own: the tokens of one rank; ranks that are lost."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fxlm.compiler.errors import EngineDead, InvalidModel, InvalidOption
from fxlm.compiler.step import load_weights
from fxlm.models.checkpoint import Checkpoint, open_checkpoint
from fxlm.models.tiny import write_checkpoint
from fxlm.runtime.check import generate, prompts
from fxlm.runtime.engine import Engine
from fxlm.runtime.options import EngineOptions
from fxlm.runtime.parallel.build import compile_ranks
from fxlm.runtime.parallel.messages import Find, Planned
from fxlm.runtime.parallel.ranks import Ranks
from fxlm.runtime.parallel.start import start_processes
from fxlm.runtime.sampling_params import SamplingParams
from fxlm.runtime.worker import build_engine
from tests.models.formats.test_compressed_tensors import write as write_quantized

GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
GIVEN = prompts(256, 256, (5, 17, 3, 40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


def options(model: Path | str, **changes: Any) -> EngineOptions:
    values: dict[str, Any] = {
        "dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 4 << 20,
        "max_num_seqs": 8, "max_num_batched_tokens": 32, "threads": 1,
    }  # fmt: skip
    return EngineOptions(model=str(model), **{**values, **changes})


def engine(model: Path | str, **changes: Any) -> Engine:
    return build_engine(options(model, **changes))[0]


def ranks_of(made: Engine) -> Ranks:
    assert isinstance(made.alarm, Ranks)
    return made.alarm


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mixtral"])
def test_greedy_tokens_are_those_of_one_rank(folder: Path, family: str, ranks: int) -> None:
    model = write_checkpoint(family, folder / family)
    expected = generate(engine(model), GIVEN, GREEDY)
    cut = engine(model, tensor_parallel_size=ranks)
    assert generate(cut, GIVEN, GREEDY) == expected
    assert generate(cut, GIVEN, GREEDY) == expected  # by way of the prefix cache
    ranks_of(cut).close()


def test_tokens_shared_between_linears(folder: Path) -> None:
    model = write_checkpoint("llama", folder / "shared-tokens")
    expected = generate(engine(model), GIVEN, GREEDY)
    cut = engine(model, tensor_parallel_size=2, sequence_parallel=True)
    assert generate(cut, GIVEN, GREEDY) == expected
    ranks_of(cut).close()


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_quantized_checkpoint(folder: Path, ranks: int) -> None:
    model = folder / f"int4-{ranks}"
    write_quantized(model, "int4")
    expected = generate(engine(model), GIVEN, GREEDY)
    cut = engine(model, tensor_parallel_size=ranks)
    assert generate(cut, GIVEN, GREEDY) == expected
    ranks_of(cut).close()


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[Engine]:
    """Two ranks of one model, until the last test that takes them kills one."""
    write_checkpoint("llama", folder / "pair")
    made = engine(folder / "pair", tensor_parallel_size=2, distributed_timeout_seconds=3)
    yield made
    ranks_of(made).close()


def test_forks_copy_blocks_on_every_rank(pair: Engine, folder: Path) -> None:
    params = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=6, ignore_eos=True)
    expected = generate(engine(folder / "pair"), GIVEN[:1], params)
    assert generate(pair, GIVEN[:1], params) == expected


def test_all_is_well(pair: Engine) -> None:
    assert ranks_of(pair).trouble() is None
    assert not select.select([ranks_of(pair)], [], [], 0)[0]


def test_a_killed_rank_ends_an_idle_engine(pair: Engine) -> None:
    pid = ranks_of(pair).pids[1]
    os.kill(pid, signal.SIGKILL)
    assert select.select([ranks_of(pair)], [], [], 20)[0]
    assert pair.trouble() == f"rank 1 (pid {pid}) was killed by SIGKILL"
    with pytest.raises(EngineDead, match="SIGKILL"):
        generate(pair, GIVEN, GREEDY)


def test_a_rank_that_hangs_in_a_step_ends_the_engine(folder: Path) -> None:
    model = write_checkpoint("llama", folder / "hang")
    made = engine(model, tensor_parallel_size=2, distributed_timeout_seconds=2)
    pid = ranks_of(made).pids[1]
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(EngineDead, match="rank 1"):
        generate(made, GIVEN, GREEDY)
    ranks_of(made).close()
    again = engine(model, tensor_parallel_size=2)  # a restart works
    assert generate(again, GIVEN[:1], GREEDY)
    pid = ranks_of(again).pids[1]
    os.kill(pid, signal.SIGSTOP)
    ranks_of(again).silence_s = 1.0
    assert select.select([ranks_of(again)], [], [], 20)[0]
    assert "rank 1 has not been heard of" in str(again.trouble())
    ranks_of(again).close()


def test_what_a_rank_says_at_the_start_is_told(folder: Path) -> None:
    ranks = start_processes(options(folder / "nothing", tensor_parallel_size=2), 2, 5.0).ranks
    ranks.meet()
    ranks.send(Find())
    with pytest.raises(EngineDead, match="rank 1: there is no directory"):
        ranks.collect(Planned)
    ranks.close()


class _Counting:
    """A checkpoint that counts the bytes that are asked of it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.num_bytes = 0

    def read(self, name: str) -> torch.Tensor:
        return self._count(self.checkpoint.read(name))

    def read_slice(self, name: str, dim: int, start: int, length: int) -> torch.Tensor:
        return self._count(self.checkpoint.read_slice(name, dim, start, length))

    def forget(self) -> None:
        self.checkpoint.forget()

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_bytes += tensor.numel() * tensor.element_size()
        return tensor


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_rank_reads_its_own_bytes_alone(folder: Path, family: str) -> None:
    model = write_checkpoint(family, folder / f"bytes-{family}")
    checkpoint = open_checkpoint(model)
    shared = sum(
        info.num_bytes for name, info in checkpoint.tensors.items()
        if "norm" in name or "block_sparse_moe.gate" in name
    )  # fmt: skip
    for made in compile_ranks(options(model, tensor_parallel_size=2), 2):
        reader = _Counting(checkpoint)
        load_weights(made.artifact, reader, torch.device("cpu"))
        assert reader.num_bytes == (checkpoint.num_bytes - shared) // 2 + shared


def test_ranks_have_one_step_and_their_own_weights(folder: Path) -> None:
    model = write_checkpoint("llama", folder / "steps")
    made = compile_ranks(options(model, tensor_parallel_size=2), 2)
    regions = [m.artifact.manifest["regions"] for m in made]
    assert regions[0] == regions[1]
    assert made[0].artifact.key != made[1].artifact.key
    assert [c.num_kv_heads for c in made[1].artifact.caches()] == [1, 1]
    (notes,) = [p["notes"] for p in made[0].artifact.manifest["passes"] if p["name"] == "shard"]
    assert "collectives: 1 all_gather, 5 all_reduce" in notes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tensor_parallel_size": 3}, InvalidOption, "4 query heads cannot be shared out"),
        ({"tensor_parallel_size": 2, "tap": ("model.layers.0",)}, InvalidOption, "use one rank"),
        ({"tensor_parallel_size": 0}, InvalidOption, "at least 1"),
        ({"sequence_parallel": True}, InvalidOption, "give tensor_parallel_size"),
        ({"tensor_parallel_size": 2, "model": "nowhere"}, InvalidModel, "not a directory here"),
    ],
)
def test_what_cannot_be_cut_is_refused_at_once(
    folder: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = write_checkpoint("llama", folder / "refused")
    with pytest.raises(error, match=message):
        engine(changes.pop("model", model), **changes)
