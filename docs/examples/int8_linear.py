"""Linear layers with weights of 8 bits: a byte a weight, and a scale a row."""

import torch

from fxlm import LLM, SamplingParams, graph_pass

aten = torch.ops.aten


@graph_pass(after=("fuse_qkv", "fuse_gate_up"))
def int8_linear(program):
    """before: linear(x, w, b)   after: _weight_int8pack_mm(x, int8(w / s), s) + b"""
    nodes = program.linears(r"_proj$")
    for node in nodes:

        def call(op, *args, like=node):
            return program.call(op, *args, like=like)

        x, w, *bias = node.args
        with program.graph.inserting_before(node):
            # These need the weight alone, so they run once, while it is loaded.
            largest = call(aten.amax.default, call(aten.abs.default, w), [1])
            scale = call(aten.div.Tensor, call(aten.clamp_min.default, largest, 1e-6), 127.0)
            ratio = call(aten.div.Tensor, w, call(aten.unsqueeze.default, scale, 1))
            codes = call(aten.to.dtype, call(aten.round.default, ratio), torch.int8)
            # These run in every step.
            rows = call(aten.select.int, x, 0, 0)
            y = call(aten._weight_int8pack_mm.default, rows, codes, scale)
            y = call(aten.unsqueeze.default, y, 0)
            if bias:
                y = call(aten.add.Tensor, y, bias[0])
        program.replace(node, y)
    return len(nodes)


if __name__ == "__main__":
    llm = LLM("bundled-draft", passes=[int8_linear], dtype="float32", enforce_eager=True)
    print(llm.generate("def add(a, b):", SamplingParams(temperature=0))[0].outputs[0].text)
