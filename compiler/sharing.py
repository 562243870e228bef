"""Sharing: a generated loop is split between threads only where it is long enough.

Inductor decides when it compiles, for the threads of that process and one number of tokens; but an
artifact serves one token and thousands, on machines with few cores and many. So every loop is
written to be shared by as many threads as there are at run time (`OPTIONS`), and `gated` adds the
condition from which number of tokens on it is. Below it no parallel section is entered at all: one
thread's section, which is what a false ``if`` clause asks for, still costs libgomp two system calls
at its barriers. Not here: who compiles the source (`builds`).
"""

from __future__ import annotations

import math
import re

# Inductor's choice of which loop to share depends on a number of threads; it is not that of the
# machine, so that the same region has the same code everywhere.
OPTIONS = {"cpp.threads": 2, "cpp.dynamic_threads": True}

ENOUGH = 1 << 13  # elements, some 5 to 10 us of one thread, which is what waking another takes

_PARALLEL = "#pragma omp parallel\n"
# Loops of a section outside of any are run by the thread that meets them.
_BRANCH = """{{
    const auto section = [=]()
{block};
    if ({condition})
    {{
        #pragma omp parallel
        section();
    }}
    else
        section();
    }}"""
_LOOP = re.compile(r"for\(int64_t (\w+)=[^;]*; \1<static_cast<int64_t>\(([^;]*)\); ")
_FACTOR = re.compile(r"(\d+)L*")


def gated(source: str) -> str:
    """The C++ source of Inductor's kernels with a condition on each parallel section.

    A section whose length is not a multiple of sizes given at run time is left as it is.
    """
    head, *sections = source.split(_PARALLEL)
    parts = [head]
    for section in sections:
        end = _end_of_block(section)
        block, rest = section[:end], section[end:]
        condition = _condition(block)
        if condition:
            parts += [_BRANCH.format(block=block, condition=condition), rest]
        else:
            parts += [_PARALLEL, section]
    return "".join(parts)


def _end_of_block(source: str) -> int:
    """Where the block that ``source`` begins with ends."""
    depth = 0
    for match in re.finditer("[{}]", source):
        depth += 1 if match[0] == "{" else -1
        if not depth:
            return match.end()
    raise AssertionError("a section has no end")


def _condition(section: str) -> str:
    """From which size on a section is shared; nothing if it cannot be told."""
    if "[tid]" in section:  # each thread has a sum of its own, outside of the section
        return ""
    found: set[tuple[str, ...]] = set()  # the sizes that the loops of a block multiply
    width = 0  # elements for each unit of these
    for block in section.split("#pragma omp for")[1:]:
        lengths: dict[str, int] = {}
        sizes: dict[str, list[str]] = {}
        for variable, bound in _LOOP.findall(block):
            factors = bound.split("*")
            numbers = [int(match[1]) for factor in factors if (match := _FACTOR.fullmatch(factor))]
            names = [factor for factor in factors if factor.isidentifier()]
            if len(numbers) + len(names) < len(factors) or sizes.get(variable, names) != names:
                return ""
            sizes[variable] = names
            lengths[variable] = max(math.prod(numbers), lengths.get(variable, 0))
        width += math.prod(lengths.values())
        found.add(tuple(sorted(name for names in sizes.values() for name in names)))
    if len(found) != 1 or not width:
        return ""
    size = "*".join(*found)
    return f"{size} >= {max(2, -(-ENOUGH // width))}" if size else ""
