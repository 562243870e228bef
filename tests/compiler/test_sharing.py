"""Loops are shared by as many threads as there are, where they are long enough."""

import re
from pathlib import Path

import pytest
import torch

from fxlm.compiler import builds, lower
from fxlm.compiler.outline import Region
from fxlm.compiler.sharing import ENOUGH, gated

ROWS = """
extern "C" void f(const float* in_ptr0, float* out_ptr0, const int64_t ks0)
{
    #pragma omp parallel
    {
        #pragma omp for
        for(int64_t x0=static_cast<int64_t>(0L); x0<static_cast<int64_t>(ks0); x0+=1)
        {
            for(int64_t x1=static_cast<int64_t>(0L); x1<static_cast<int64_t>(1024L); x1+=16)
            for(int64_t x1=static_cast<int64_t>(0L); x1<static_cast<int64_t>(1000L); x1+=16)
        }
    }
}
"""


def _conditions(source: str) -> list[str]:
    return re.findall(r"if \((.*)\)\n +\{\n +#pragma omp parallel\n", source)


def test_a_section_is_shared_from_enough_elements_on() -> None:
    assert _conditions(gated(ROWS)) == [f"ks0 >= {ENOUGH // 1024}"]


def test_each_kernel_has_its_own_condition() -> None:
    wide = ROWS.replace("1024L", "2048L").replace("ks0", "ks1")
    found = _conditions(gated(ROWS + wide))
    assert found == [f"ks0 >= {ENOUGH // 1024}", f"ks1 >= {ENOUGH // 2048}"]


def test_one_long_loop_counts_what_each_row_holds() -> None:
    flat = ROWS.replace("(ks0)", "(2048L*ks0)")
    width = 2048 * 1024
    assert _conditions(gated(flat)) == [f"ks0 >= {max(2, ENOUGH // width)}"]


@pytest.mark.parametrize("bound", ["ks0 + 1L", "c10::div_floor_integer(ks0, 2L)"])
def test_a_length_that_is_not_understood_is_left_alone(bound: str) -> None:
    source = ROWS.replace("(ks0)", f"({bound})")
    assert gated(source) == source


def test_loops_over_two_sizes_count_their_product() -> None:
    square = ROWS.replace("1024L", "ks1").replace("1000L", "ks1")
    assert _conditions(gated(square)) == [f"ks0*ks1 >= {ENOUGH}"]


def test_one_loop_of_two_lengths_is_left_alone() -> None:
    source = ROWS.replace("1024L", "ks1")
    assert gated(source) == source


def test_sums_of_threads_are_left_alone() -> None:
    source = ROWS.replace("x1+=16)", "x1+=16) tmp_acc0_arr[tid] += 1;")
    assert gated(source) == source


def _code(threads: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernel of a region, as a process of so many threads compiles it."""
    rows = torch.export.Dim("T", min=2, max=4096)
    shapes = {"x": {0: rows}}
    exported = torch.export.export(_Norm(), (torch.empty(7, 2048),), dynamic_shapes=shapes)
    region = Region(name="norm", graph=exported.graph, digest="")
    sources = []
    compile_one = builds.Builds._compile

    def watch(self: builds.Builds, words: list[str], output: str) -> object:
        job = compile_one(self, words, output)
        sources.extend(Path(w).read_text() for w in words if w.endswith(".kernel.cpp"))
        return job

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(builds.Builds, "_compile", watch)
            lower.lower({folder / f"{threads}.pt2": region}, folder)
    finally:
        torch.set_num_threads(before)
    return re.sub(r"//.*", "", sources[0])  # comments name files


class _Norm(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))


def test_the_code_does_not_depend_on_the_threads_of_who_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = _code(1, tmp_path, monkeypatch)
    assert _conditions(one) == [f"ks0 >= {ENOUGH // 2048}"]
    assert one == _code(8, tmp_path, monkeypatch)
