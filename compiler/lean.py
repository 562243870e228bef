"""Lean: work of Inductor's that changes no result is left out, or done in a shorter way.

Each entry says what it saves of a compilation of three regions. Not here: the compiler's runs
(`builds`), which regions are compiled (`lower`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch.fx.traceback import preserve_node_meta

# The checks of inputs that AOTI_RUNTIME_CHECK_INPUTS=1 asks for, a page of C++ an input.
_NO_CHECKS = """
static constexpr bool _check_aoti_runtime_check_inputs_env() { return false; }
static void __check_inputs_outputs(AtenTensorHandle*, AtenTensorHandle*) {}
"""


@contextlib.contextmanager
def lean() -> Iterator[None]:
    """Within: packages are written without checks of inputs; 0.2 s of Python, 0.3 s of g++."""
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    name = "generate_input_output_runtime_checks"
    whole: Any = getattr(CppWrapperCpu, name, None)

    def write(self: Any) -> None:
        if hasattr(self.prefix, "splice_aot"):
            self.prefix.splice_aot(_NO_CHECKS)
        else:  # a torch that writes otherwise
            whole(self)

    with (
        contextlib.nullcontext() if whole is None else mock.patch.object(CppWrapperCpu, name, write)
    ):
        yield


@contextlib.contextmanager
def lean_alone() -> Iterator[None]:
    """Within a process that compiles regions for a CPU and nothing else, ever: more is left out."""
    _import_without_templates()
    from torch._inductor import compile_fx
    from torch._inductor.fx_passes import fuse_attention

    with (
        # What AOTAutograd does to modules with state and gradients, and to ops that write where
        # others read: 1 s. In a region, ops of ours alone write, to caches that they alone read.
        mock.patch.object(compile_fx, "aot_export_module", _decomposed),
        mock.patch.object(compile_fx, "_unlift_graph", lambda module, graph, signature: graph),
        # Patterns of attention, which is an op of ours: 0.3 s.
        mock.patch.object(fuse_attention, "_sfdp_init"),
    ):
        yield


def _import_without_templates() -> None:
    """Import Inductor's lowerings without compiling its templates for GPUs: 0.3 s."""
    from torch._inductor.codegen.common import KernelTemplate

    with mock.patch.object(KernelTemplate, "_template_from_string", return_value=None):
        import torch._inductor.lowering  # noqa: F401


def _decomposed(
    module: fx.GraphModule, inputs: Sequence[Any], *, trace_joint: bool, decompositions: Any
) -> tuple[fx.GraphModule, None]:
    """The graph in the ops that Inductor lowers; ops that write to their arguments stay."""
    from torch._dispatch.python import enable_python_dispatcher
    from torch._guards import detect_fake_mode
    from torch.fx.experimental.proxy_tensor import make_fx

    assert not trace_joint

    def run(*args: Any) -> tuple[Any, ...]:
        return tuple(fx.Interpreter(module).run(*args))

    mode = detect_fake_mode(inputs)
    assert mode is not None, "a region takes no tensor"
    with mode, enable_python_dispatcher(), torch.no_grad(), preserve_node_meta():
        return make_fx(run, decomposition_table=decompositions)(*inputs), None
