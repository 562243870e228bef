"""Return hidden states to the requests that ask for them.

before:  return ids, logprobs, ...
after:   h = select(add_5, 0, 0)                  the residual stream behind model.layers.3  [T, H]
         return ids, logprobs, ..., h

A point is the path of a module; what leaves it is returned, a row a token. Not here: which
request gets which rows (the runtime's), and values that no module returns: `Program.tap`.
"""

from __future__ import annotations

from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program
from fxlm.compiler.rewrite import module_output


@graph_pass(before="paged_attention")
def tap(program: Program, *, points: tuple[str, ...] = ()) -> int:
    """Tap the output of the module at each path; returns how many."""
    for path in points:
        program.tap(path, module_output(program, path))
    return len(points)
