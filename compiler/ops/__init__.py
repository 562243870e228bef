"""Custom ops of namespace ``fxlm``: schemas, fakes, PyTorch references, fast kernels.

Here is `load`, which registers everything once a process. Nothing here imports torch before
`load` is called, and nothing imports ``torch._dynamo`` or ``torch._inductor`` at all: a compiled
artifact is served after a bare ``import torch`` and ``load()``.

    collectives.py sums and gathers over ranks
    fake.py       schemas and shapes of the results
    grouped.py    the linear layers of experts
    linear.py     linear layers over packed weights
    quantized.py  quantized weights: canonical form, packed form, linear layers over them
    reference.py  plain PyTorch, any device: CUDA for now, and what the kernels are tested against
    build.py      compiles and caches csrc/ for the CPU at hand
    csrc/         the CPU kernels

Not here: the passes that place the ops into a graph (``fxlm.passes``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_library: torch.library.Library | None = None  # dropping it would unregister the ops
_cpu: str = ""


def load() -> None:
    """Register every op of namespace ``fxlm``; idempotent.

    The CPU kernels are compiled on first use (seconds; cached for the user) and loaded from the
    cache afterwards; tensors on the CPU come from their pool of memory from then on. Where there
    is no C++ compiler the PyTorch references serve, with a warning.
    """
    global _library, _cpu
    if _library is not None:
        return
    import fxlm.compiler.ops.collectives
    import fxlm.compiler.ops.grouped  # noqa: F401
    from fxlm.compiler.ops import build, fake

    _library = fake.register()
    _cpu = build.load_kernels()


def cpu_implementation() -> str:
    """What runs the ops on CPU after `load`: an ISA such as ``avx512`` or ``reference``."""
    load()
    return _cpu
