"""Print the largest absolute value that enters each linear layer."""

import torch

from fxlm import LLM, SamplingParams, graph_pass
from fxlm.compiler.program import module_path

aten = torch.ops.aten


@graph_pass(before="fuse_qkv")
def tap_absmax(program):
    """before: y = linear(x, w)   after: the same, and amax(abs(x), -1) is a tap [T]"""
    nodes = program.linears()
    for node in nodes:
        with program.graph.inserting_before(node):
            size = program.call(aten.abs.default, node.args[0], like=node)
            largest = program.call(aten.amax.default, size, [-1], like=node)
        program.tap(module_path(node), largest)
    return len(nodes)


if __name__ == "__main__":
    llm = LLM("bundled-draft", passes=[tap_absmax], dtype="float32", enforce_eager=True)
    params = SamplingParams(temperature=0, max_tokens=8, taps=list(llm.taps), tap_prompt=True)
    (answer,) = llm.generate("def add(a, b):", params)[0].outputs
    for module, rows in answer.taps.items():  # a number a token
        print(f"{module:34} {rows.max():8.3f}")
