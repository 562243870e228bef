"""Sharing: a generated loop is split between threads only where it is long enough.

Inductor decides when it compiles, for the threads of that process and one number of tokens; but an
artifact serves one token and thousands, on machines with few cores and many. So every loop is
written to be shared by as many threads as there are at run time (`OPTIONS`), and `gated` adds the
condition from which number of tokens on it is. Not here: who compiles the source (`builds`).
"""

from __future__ import annotations

import math
import re

# Inductor's choice of which loop to share depends on a number of threads; it is not that of the
# machine, so that the same region has the same code everywhere.
OPTIONS = {"cpp.threads": 2, "cpp.dynamic_threads": True}

ENOUGH = 1 << 13  # elements, some 5 to 10 us of one thread, which is what waking another takes

_PARALLEL = "#pragma omp parallel\n"
_LOOP = re.compile(r"for\(int64_t (\w+)=[^;]*; \1<static_cast<int64_t>\(([^;]*)\); ")
_FACTOR = re.compile(r"(\d+)L*")


def gated(source: str) -> str:
    """The C++ source of Inductor's kernels with a condition on each parallel section.

    A section whose length is not a multiple of one size given at run time is left as it is.
    """
    head, *sections = source.split(_PARALLEL)
    parts = [head]
    for section in sections:
        body = section.partition("\nextern ")[0]  # up to the next kernel
        parts += [_PARALLEL.replace("\n", f"{_condition(body)}\n"), section]
    return "".join(parts)


def _condition(section: str) -> str:
    """The clause for a section, or nothing."""
    sizes: set[str] = set()
    width = 0  # elements for each unit of the size
    for block in section.split("#pragma omp for")[1:]:
        bounds: dict[str, int] = {}
        for variable, bound in _LOOP.findall(block):
            length = 1
            for factor in bound.split("*"):
                if match := _FACTOR.fullmatch(factor):
                    length *= int(match[1])
                elif factor.isidentifier():
                    sizes.add(factor)
                else:
                    return ""
            bounds[variable] = max(length, bounds.get(variable, 0))
        width += math.prod(bounds.values())
    if len(sizes) != 1 or not width:
        return ""
    return f" if({sizes.pop()} >= {max(2, -(-ENOUGH // width))})"
