"""Tiered start: the graph serves first, the compiled step takes over, nothing is left behind."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fxlm.compiler.artifact import Artifact
from fxlm.compiler.errors import ArtifactError, FxlmError
from fxlm.runtime import tiers
from fxlm.runtime.compile import compile_for
from fxlm.runtime.engine import Engine
from fxlm.runtime.options import EngineOptions
from fxlm.runtime.request import Request
from fxlm.runtime.sampling_params import SamplingParams
from fxlm.runtime.tiers import Background, first_tier
from fxlm.runtime.worker import ModelWorker, build_engine

PATIENCE_S = 200


@pytest.fixture
def options(tmp_path: Path) -> EngineOptions:
    return EngineOptions(
        model="bundled-draft", cache_dir=str(tmp_path), max_model_len=64, max_num_seqs=2,
        kv_cache_memory_bytes=1 << 20, tiered_start=True,
    )  # fmt: skip


def greedy(engine: Engine, name: str) -> list[int]:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    engine.add_request(Request(request_id=name, prompt_token_ids=[5, 6, 7, 8], params=params))
    tokens: list[int] = []
    while engine.has_unfinished():
        for output in engine.step():
            tokens += output.token_ids
    return tokens


def left_behind(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob(".*") if not p.name.endswith(".lock"))


@pytest.mark.timeout(PATIENCE_S)
def test_the_compiled_step_takes_over(options: EngineOptions, tmp_path: Path) -> None:
    engine, _, compilation = build_engine(options)
    assert engine.worker.tier == "interpreted"
    assert compilation.miss is not None
    before = greedy(engine, "before")
    while engine.worker.tier == "interpreted":
        time.sleep(0.05)
    assert greedy(engine, "after") == before
    assert engine.stats().tier == "compiled"
    assert left_behind(tmp_path) == []
    again, _, compilation = build_engine(options)
    assert (again.worker.tier, compilation.miss) == ("compiled", None)


@pytest.fixture
def background(options: EngineOptions) -> Iterator[Background]:
    made = Background(options)
    yield made
    made.close()


def test_an_end_while_compiling_leaves_nothing(background: Background, tmp_path: Path) -> None:
    first = background.next_artifact()
    assert not first.compiled
    background.close()
    kept = [path.name for path in (tmp_path / "artifacts").iterdir() if path.is_dir()]
    assert kept == [first.path.name]
    assert left_behind(tmp_path) == []


# The process whose work is over, told to stop while it ends.
ENDING = """
import atexit, os, signal
from fxlm.runtime import tiers
tiers._compile = lambda options, say: None
atexit.register(os.kill, os.getpid(), signal.SIGINT)
raise SystemExit(tiers.main())
"""


def test_a_process_that_is_done_ends_quietly(options: EngineOptions) -> None:
    command = [sys.executable, "-P", "-c", ENDING]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdin is not None
        assert run.stderr is not None
        run.stdin.write(json.dumps(options.as_json()) + "\n")
        run.stdin.flush()  # stays open: its end would stop the work, too
        assert (run.wait(timeout=60), run.stderr.read()) == (0, "")


def test_a_fault_of_the_options_is_told(options: EngineOptions) -> None:
    faulty = Background(replace(options, disable_passes=("sample",)))
    with pytest.raises(FxlmError, match="cannot run without it"):
        faulty.next_artifact()
    faulty.close()


def test_no_process_where_nothing_is_left_to_make(
    options: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "Background", None)
    compilation, background = first_tier(replace(options, enforce_eager=True))
    assert (compilation.artifact.compiled, background) == (False, None)


def test_the_next_step_runs_what_came(options: EngineOptions) -> None:
    engine, _, compilation = build_engine(replace(options, enforce_eager=True))
    worker = engine.worker
    assert isinstance(worker, ModelWorker)
    before, step = greedy(engine, "before"), worker._step
    worker.upgrade(compilation.artifact)
    assert worker._step is step
    assert greedy(engine, "after") == before
    assert worker._step is not step


def test_other_graphs_are_refused(options: EngineOptions, tmp_path: Path) -> None:
    own = replace(options, enforce_eager=True)
    engine, _, _ = build_engine(own)
    other: Artifact = compile_for(replace(own, model="bundled")).artifact
    worker = engine.worker
    assert isinstance(worker, ModelWorker)
    step = worker._step
    with pytest.raises(ArtifactError, match="has other weights"):
        worker.upgrade(other)
    assert worker._step is step
    assert worker._next is None
