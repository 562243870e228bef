"""Ranks that torchrun started: they meet, give one rank's tokens, and leave with rank 0."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fxlm.compiler.errors import EngineDead, InvalidOption
from fxlm.models.tiny import write_checkpoint
from fxlm.runtime.check import generate
from fxlm.runtime.engine import Engine
from fxlm.runtime.parallel.build import build_parallel
from tests.runtime.parallel.test_engine import GIVEN, GREEDY, engine, options, ranks_of

PATIENCE_S = 60
SCRIPT = """
import json, sys
from fxlm import LLM, SamplingParams
llm = LLM(sys.argv[1], skip_tokenizer_init=True, dtype="float32", enforce_eager=True, threads=1,
          kv_cache_memory_bytes=4 << 20, max_num_seqs=8, max_num_batched_tokens=32,
          tensor_parallel_size=2)
params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, detokenize=False)
found = llm.generate(json.loads(sys.argv[2]), params, use_tqdm=False)
print(json.dumps([list(o.outputs[0].token_ids) for o in found]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("torchrun") / "llama")


def test_a_script_runs_on_in_rank_0_alone(model: Path) -> None:
    script = model.parent / "script.py"
    script.write_text(SCRIPT)
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--master-port", str(free_port()), str(script), str(model), json.dumps(GIVEN)],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    (line,) = ended.stdout.splitlines()
    assert json.loads(line) == [list(tokens) for tokens in generate(engine(model), GIVEN, GREEDY)]


@pytest.fixture
def far(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """This process is rank 0 of torchrun's; rank 1, `fxlm serve`, as if on another machine."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
             "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # fmt: skip
    for name, value in {**place, "RANK": "0", "GROUP_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    flags = (
        "--dtype float32 --enforce-eager --kv-cache-memory-bytes 4MiB --max-num-seqs 8 --threads 1 "
        "--max-num-batched-tokens 32 --tensor-parallel-size 2 --distributed-timeout-seconds 2 "
        "--distributed-executor-backend external_launcher --no-tiered-start"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "fxlm", "serve", str(model), *flags.split()],
        env={**os.environ, "RANK": "1", "GROUP_RANK": "1"},
    )
    yield process
    process.kill()
    process.wait()


def pair(model: Path) -> Engine:
    return build_parallel(
        options(
            model, tensor_parallel_size=2, distributed_timeout_seconds=2,
            distributed_executor_backend="external_launcher",
        )
    )[0]  # fmt: skip


def test_ranks_of_two_machines_meet_over_tcp(model: Path, far: subprocess.Popen[bytes]) -> None:
    made = pair(model)
    assert ranks_of(made).orders.address.endpoint.startswith("tcp://127.0.0.1:")
    assert ranks_of(made).orders.address.server_key
    assert generate(made, GIVEN, GREEDY) == generate(engine(model), GIVEN, GREEDY)
    with pytest.raises(InvalidOption, match="serve one engine alone"):
        pair(model)
    ranks_of(made).close()
    assert far.wait(PATIENCE_S) == 0


def test_a_rank_of_another_machine_that_is_killed(
    model: Path, far: subprocess.Popen[bytes]
) -> None:
    made = pair(model)
    far.kill()
    assert select.select([ranks_of(made)], [], [], PATIENCE_S)[0]
    assert "rank 1 has not been heard of" in str(made.trouble())
    with pytest.raises(EngineDead, match="rank 1"):
        generate(made, GIVEN, GREEDY)
    ranks_of(made).close()


def free_port() -> int:
    """A port that nobody has at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])
