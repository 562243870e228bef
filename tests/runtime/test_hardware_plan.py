"""Plans for other machines: files that come with the package, floors, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from fxlm.compiler.errors import InvalidOption
from fxlm.models.tiny import write_checkpoint
from fxlm.runtime.hardware_plan import Hardware, hardware_names, plan_ranks, read_hardware, table
from fxlm.runtime.options import EngineOptions

FOUR = Hardware(
    name="four", about="made up", kind="cuda", devices=4, memory_bytes=1e9, read_bytes_per_s=1e9,
    link_bytes_per_s=1e6, link_latency_s=1e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> EngineOptions:
    model = write_checkpoint("llama", tmp_path_factory.mktemp("plan") / "model")
    return EngineOptions(model=str(model), dtype="float32")


def test_files_come_with_the_package() -> None:
    assert hardware_names() == ["8xh100-nvlink", "cpu-2core-avx512", "h100"]
    for name in hardware_names():
        assert read_hardware(name).name == name


def test_a_line_for_each_number_of_ranks(options: EngineOptions) -> None:
    plans = plan_ranks(options, FOUR, [1, 2, 3, 8])
    one, two, three, eight = plans
    assert one.sent_bytes_per_token == 0
    # 5 sums of 64 floats (a ring of two sends each once), half of 256 logits.
    assert two.sent_bytes_per_token == 5 * 64 * 4 + 256 * 4 // 2
    assert two.weights_bytes < 0.6 * one.weights_bytes
    assert two.kv_bytes_per_token * 2 == one.kv_bytes_per_token
    floor = two.weights_bytes / 1e9 + two.sent_bytes_per_token / 1e6 + 6 * 1e-3
    assert two.step_floor_s == pytest.approx(floor)
    assert "4 query heads do not divide" in three.refusal
    assert eight.refusal == "four has 4 devices"
    lines = table(FOUR, plans, 512)
    assert lines[0] == "four: made up"
    assert "512 x " in lines[2]
    assert lines[4].startswith("    3      1 cannot be: shard:")


def test_stages_have_their_own_layers_and_hand_on(options: EngineOptions) -> None:
    plans = plan_ranks(options, FOUR, [1, 2, 4], [1, 2, 3])
    found = {(plan.stages, plan.ranks): plan for plan in plans}
    one, two = found[1, 1], found[2, 1]
    assert two.kv_bytes_per_token * 2 == one.kv_bytes_per_token
    assert one.weights_bytes / 2 <= two.weights_bytes < one.weights_bytes
    assert two.sent_bytes_per_token == 64 * 4  # the hidden state, once
    floor = one.weights_bytes / 1e9 + 64 * 4 / 1e6 + 1e-3  # one after another; frequencies twice
    assert two.step_floor_s == pytest.approx(floor, rel=1e-4)
    assert found[2, 2].weights_bytes < 0.6 * two.weights_bytes
    assert found[2, 4].refusal == "four has 4 devices"
    assert "2 layers cannot be cut into 3 stages" in found[3, 1].refusal


def test_a_scatter_and_a_gather_send_what_an_all_reduce_does(options: EngineOptions) -> None:
    shared = replace(options, tensor_parallel_size=2, sequence_parallel=True)
    one, two = plan_ranks(shared, FOUR, [1, 2])
    assert one == plan_ranks(options, FOUR, [1])[0]
    assert two.sent_bytes_per_token == 5 * 64 * 4 + 256 * 4 // 2
    floor = two.weights_bytes / 1e9 + two.sent_bytes_per_token / 1e6 + 11 * 1e-3
    assert two.step_floor_s == pytest.approx(floor)


def test_ranks_of_a_cpu_share_it(options: EngineOptions) -> None:
    machine = read_hardware("cpu-2core-avx512")
    assert (machine.share(1), machine.share(2)) == (1.0, 0.5)
    one, two = plan_ranks(options, machine, [1, 2])
    assert two.step_floor_s > one.step_floor_s  # the same bytes, and what they tell each other


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="one of 8xh100-nvlink"):
        read_hardware("h200")
    path = tmp_path / "odd.json"
    path.write_text(json.dumps({"name": "odd"}))
    with pytest.raises(InvalidOption, match="about"):
        read_hardware(str(path))


@pytest.mark.parametrize("field", ["devices", "memory_bytes", "read_bytes_per_s"])
def test_numbers_that_nothing_can_be_divided_by_are_named(field: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text(json.dumps({**msgspec.to_builtins(FOUR), field: 0}))
    with pytest.raises(InvalidOption, match=f"{field} is 0"):
        read_hardware(str(path))
