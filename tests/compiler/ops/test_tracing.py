"""The ops under fake tensors, export and AOTInductor: dynamic sizes, mutation without copies."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import opcheck

from tests.compiler.ops.cases import Row, Rules, make_step, sample_args

OPS = torch.ops.fxlm
SINKS = torch.linspace(-1, 1, 4)
QUICK = {
    "aot_inductor.precompile_headers": False,
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "cpp.vec_isa_ok": True,
}  # for one package
NAMES = (
    *("attention", "paged_attention", "paged_attention_read_only", "paged_attention_reference"),
    *("sample", "sample_reference"),
    *("pack_weight", "packed_linear", "packed_linear_reference", "packed_rows"),
    *("pack_gated_weight", "packed_gated_linear"),
)


def calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    step = make_step([5, 1, 3], [0, 30, 9], dv=24)
    rules = Rules(window=7, sinks=SINKS).args()
    row = Row(temperature=1.0, num_logprobs=3, adjust=[(4, 1, 0.5)])
    sampled = sample_args(torch.randn(3, 50), [row] * 3)
    shared = (step.q, None, None, *step.args()[3:], *rules)
    packed = OPS.pack_weight(torch.randn(70, 9))
    linear = (torch.randn(2, 3, 9), packed, torch.randn(70), 70)
    gated = (torch.randn(2, 3, 9), OPS.pack_weight(torch.randn(70, 9), True), torch.randn(70), 70)
    return {
        "pack_gated_weight": (OPS.pack_weight, (torch.randn(70, 9), True)),
        "packed_gated_linear": (OPS.packed_linear, (*gated, "silu_and_mul")),
        "pack_weight": (OPS.pack_weight, (torch.randn(70, 9, dtype=torch.bfloat16),)),
        "packed_linear": (OPS.packed_linear, linear),
        "packed_linear_reference": (OPS.packed_linear_reference, linear),
        "packed_rows": (OPS.packed_rows, (packed, torch.tensor([[3, 0], [69, 3]]), 9)),
        "attention": (OPS.attention, (step.q, step.k, step.v, 2, *rules)),
        "paged_attention": (OPS.paged_attention, (*step.args(), *rules)),
        "paged_attention_read_only": (OPS.paged_attention, shared),
        "paged_attention_reference": (OPS.paged_attention_reference, (*step.args(), *rules)),
        "sample": (OPS.sample, sampled),
        "sample_reference": (OPS.sample_reference, sampled),
    }


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    op, args = calls()[name]
    utils = ("test_schema", "test_faketensor")
    # The caches hold NaN where nothing was written, and NaN differs from itself.
    args = tuple(x.nan_to_num() if _floating(x) else x for x in args)
    opcheck(op.default, args, test_utils=utils)


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@pytest.mark.parametrize("name", NAMES)
def test_fakes_agree_with_kernels(name: str) -> None:
    op, args = calls()[name]
    real = op(*(x.clone() if isinstance(x, Tensor) else x for x in args))
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        fake = op(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args))
    for a, b in zip(_tuple(real), _tuple(fake), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def _tuple(x: Any) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


class Layer(torch.nn.Module):
    """One layer that writes the cache, one that reads it, and the sampler."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        q, k, v, k_cache, v_cache, slots, start, lengths, table, sinks, *sampling = inputs
        q, k, v = ((x * 2).transpose(1, 2) for x in (q, k, v))
        cache = (k_cache, v_cache, slots, start, lengths, table)
        first = OPS.paged_attention(q, k, v, *cache, 0.25, 0, 0, 0.0, sinks, None)
        second = OPS.paged_attention(q, None, None, *cache, 0.25, 3, 0, 0.0, None, None)
        return tuple(OPS.sample((first + second).flatten(2)[0], *sampling, 20))


def layer_inputs(queries: list[int], contexts: list[int]) -> tuple[Tensor, ...]:
    step = make_step(queries, contexts, block_size=4)
    q, k, v, *cache = step.args()
    cache[:2] = (torch.cat([x, x[:1].expand(40 - len(x), -1, -1, -1)]) for x in cache[:2])
    tokens = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    rows = [Row(temperature=1.0, top_p=0.9, counter=i) for i in range(sum(queries))]
    sampling = sample_args(torch.empty(0), rows)[1:-1]
    return (*tokens, *cache, SINKS, *sampling)


@pytest.mark.timeout(300)
def test_export_and_aot_inductor(tmp_path: Path) -> None:
    t, s, b = (torch.export.Dim(name, min=1, max=4096) for name in ("tokens", "seqs", "cols"))
    starts, entries = (torch.export.Dim(name, min=1, max=4096) for name in ("starts", "entries"))
    rows = torch.export.Dim("row_starts", min=1, max=4097)
    shapes = (
        *({1: t}, {1: t}, {1: t}, None, None, {0: t}, {0: starts}, {0: s}, {0: s, 1: b}, None),
        *({0: t}, {0: t}, {0: rows}, {0: entries}, {0: entries}, {0: entries}),
    )
    example = layer_inputs([3, 2], [0, 5])
    example = (*example[:-3], *(torch.cat([x, x]) for x in example[-3:]))
    with torch.no_grad():
        program = torch.export.export(
            Layer(), example, dynamic_shapes={"inputs": shapes}, strict=False
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its tree specs
        path = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "layer.pt2"),
            inductor_configs=QUICK,
        )
        compiled = torch._inductor.aoti_load_package(path)
    for queries, contexts in (([1], [0]), ([1], [9]), ([3, 2], [0, 5]), ([4, 1, 7], [2, 0, 3])):
        inputs = layer_inputs(queries, contexts)
        twins = [x.clone() for x in inputs]
        with torch.no_grad():
            want = Layer()(*twins)
        got = compiled(*inputs)
        assert torch.equal(got[0], want[0])
        assert torch.equal(inputs[3].nan_to_num(9), twins[3].nan_to_num(9))
        assert torch.equal(inputs[4].nan_to_num(9), twins[4].nan_to_num(9))


def test_loading_imports_no_compiler() -> None:
    script = (
        "import sys, torch\n"
        "from fxlm.compiler import ops\n"
        "ops.load(); ops.load()\n"
        "q = torch.ones(1, 1, 2, 8)\n"
        "torch.ops.fxlm.attention(q, q, q, 0, 1.0, 0, 0, 0.0, None, None)\n"
        "heavy = ('torch._inductor', 'torch._dynamo', 'transformers', 'sympy')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_importing_the_package_imports_no_torch() -> None:
    script = "import sys, fxlm.compiler.ops; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
