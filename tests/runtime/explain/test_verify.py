"""verify: the errors of an artifact, and a stamp that holds for it alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fxlm.compiler.artifact import open_artifact
from fxlm.compiler.errors import InvalidOption
from fxlm.compiler.options import CompileOptions
from fxlm.models.checkpoint import open_checkpoint
from fxlm.models.tiny import write_checkpoint
from fxlm.runtime.compile import Compilation
from fxlm.runtime.explain import stamp
from fxlm.runtime.explain import verify as verifying
from fxlm.runtime.explain.compare import Errors
from fxlm.runtime.explain.fixtures import MODES
from fxlm.runtime.explain.verify import EXACT, faults_of, limits_of, rounds, verify
from fxlm.runtime.options import EngineOptions
from fxlm.runtime.worker import load_prepared
from tests.runtime.explain.faults import five_percent, not_a_number, wrong_scale

Verified = tuple[stamp.Stamp, Compilation]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> EngineOptions:
    path = write_checkpoint("llama", tmp_path_factory.mktemp("verify") / "model")
    return EngineOptions(model=str(path), enforce_eager=True, cache_dir=str(path.parent))


@pytest.fixture(scope="module")
def verified(options: EngineOptions) -> Verified:
    return verify(options)


def test_errors_of_every_mode_are_stamped(verified: Verified) -> None:
    found, made = verified
    assert found.passed
    assert set(found.errors) == set(MODES)
    assert found.largest < 1e-3
    assert stamp.read(made.artifact, found.weights) == found
    assert "verified" in stamp.line(made.artifact, found.weights)


def test_the_artifact_stays_whole(verified: Verified) -> None:
    assert open_artifact(verified[1].artifact.path)


def test_a_wrong_model_is_stamped_as_wrong(options: EngineOptions) -> None:
    found, made = verify(replace(options, passes=(wrong_scale,)))
    assert not found.passed
    assert "FOUND WRONG" in stamp.line(made.artifact, found.weights)


def test_a_model_that_gives_no_number_is_stamped_as_wrong(options: EngineOptions) -> None:
    found, made = verify(replace(options, passes=(not_a_number,)))
    assert found.largest == float("inf")
    assert "FOUND WRONG" in stamp.line(made.artifact, found.weights)


def test_the_weights_that_are_served_are_verified(
    options: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(compilation: Compilation, options: EngineOptions) -> Any:
        weights, origin = load_prepared(compilation, options)
        return {name: value * 1.5 for name, value in weights.items()}, origin

    monkeypatch.setattr(verifying, "load_prepared", damaged)
    assert not verify(options)[0].passed


def test_a_model_without_a_longest_context_is_verified(tmp_path: Path) -> None:
    path = write_checkpoint("bloom", tmp_path / "model")
    given = EngineOptions(model=str(path), enforce_eager=True, cache_dir=str(tmp_path))
    assert verify(given)[0].passed


def test_tolerance_is_the_users(options: EngineOptions) -> None:
    assert verify(replace(options, passes=(wrong_scale,)), tolerance=100.0)[0].passed


def test_a_fault_that_rounding_hides_shows_in_float32(tmp_path: Path) -> None:
    path = write_checkpoint("llama", tmp_path / "half", dtype="bfloat16")
    options = EngineOptions(model=str(path), enforce_eager=True, cache_dir=str(tmp_path))
    found, made = verify(replace(options, passes=(five_percent,)))
    assert found.largest <= found.tolerance
    assert [fault.split(":")[0] for fault in found.faults] == ["the passes change the model"]
    assert "the passes change the model" in stamp.line(made.artifact, found.weights)
    honest, _ = verify(options)
    assert honest.passed
    assert honest.column is not None
    assert honest.column < EXACT / 10


def test_what_is_rounded_on_purpose_is_not_held_in_float32(options: EngineOptions) -> None:
    checkpoint = open_checkpoint(options.model)
    assert not rounds(CompileOptions(), checkpoint)
    assert rounds(CompileOptions(kv_cache_dtype="int8"), checkpoint)
    assert rounds(CompileOptions(quantization="int8"), checkpoint)


def test_a_typical_error_counts_where_the_largest_hides_it() -> None:
    def errors(absolute: float, typical: float) -> Errors:
        return Errors(absolute=absolute, typical=typical, relative=0.0, agreement=1.0,
                      num_rows=1, worst=(0, 0))  # fmt: skip

    mode = "prefill alone"
    limits = limits_of({mode: errors(0.6, 0.04)}, "bfloat16", None)
    assert limits == (1.2, 0.08)
    assert not list(faults_of({mode: errors(0.6, 0.05)}, limits, None))
    (fault,) = faults_of({mode: errors(0.6, 0.09)}, limits, None)
    assert "typically 0.09 nats" in fault


def test_taps_and_steering_points_are_no_hindrance(options: EngineOptions) -> None:
    at = ("model.layers.0",)
    assert verify(replace(options, tap=at, steer=at))[0].passed


def test_other_weights_are_not_verified(verified: Verified) -> None:
    assert stamp.line(verified[1].artifact, "0" * 64) == stamp.NOT_VERIFIED


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"manifest": 1}'])
def test_a_damaged_stamp_is_none(text: str, verified: Verified) -> None:
    found, made = verified
    (made.artifact.path / stamp.FILE).write_text(text)
    assert stamp.read(made.artifact, found.weights) is None
    stamp.write(made.artifact, found)


@pytest.mark.parametrize(("old", "new"), [("absolute", "absolutd"), ('"date": "2', '"date": "3')])
def test_a_stamp_with_a_wrong_byte_is_none(old: str, new: str, verified: Verified) -> None:
    found, made = verified
    path = made.artifact.path / stamp.FILE
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert stamp.line(made.artifact, found.weights) == stamp.NOT_VERIFIED
    stamp.write(made.artifact, found)


def test_a_copied_stamp_is_none(verified: Verified, tmp_path: Path) -> None:
    found, made = verified
    content = made.artifact.manifest
    (tmp_path / "manifest.json").write_text(json.dumps({**content, "key": "another"}))
    other = replace(made.artifact, path=tmp_path)
    stamp.write(other, found)
    assert stamp.read(other, found.weights) is None


def test_an_artifact_that_cannot_be_written_is_named(verified: Verified) -> None:
    with pytest.raises(InvalidOption, match="cannot be written"):
        stamp.write(replace(verified[1].artifact, path=Path("/proc/nothing")), verified[0])


def test_it_is_named_before_anything_is_run(
    options: EngineOptions, verified: Verified, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = replace(verified[1].artifact, path=Path("/proc/nothing"))
    made = replace(verified[1], artifact=there)
    monkeypatch.setattr(verifying, "compile_for", lambda *args, **kwargs: made)
    monkeypatch.setattr(verifying.subjects, "reference", None)  # a run would call it
    with pytest.raises(InvalidOption, match="cannot be written"):
        verify(options)
