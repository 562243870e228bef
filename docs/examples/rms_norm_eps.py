"""Replace the epsilon of every RMSNorm, here by one that is large enough to be noticed."""

import torch

from fxlm import LLM, SamplingParams, graph_pass
from fxlm.compiler.rewrite import replace_pattern

aten = torch.ops.aten
OLD, NEW = 1e-6, 0.05


def inverse_rms(epsilon):
    def pattern(x):
        mean = aten.mean.dim(aten.pow.Tensor_Scalar(x, 2), [-1], True)
        return aten.rsqrt.default(aten.add.Tensor(mean, epsilon))

    return pattern


@graph_pass(before="paged_attention", expects=lambda program: len(program.find(aten.rsqrt.default)))
def change_epsilon(program):
    """before: rsqrt(mean(x ** 2) + OLD)   after: rsqrt(mean(x ** 2) + NEW)"""
    return replace_pattern(program, inverse_rms(OLD), inverse_rms(NEW))


if __name__ == "__main__":
    llm = LLM("bundled-draft", passes=[change_epsilon], dtype="float32", enforce_eager=True)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    (answer,) = llm.generate("def add(a, b):", params)[0].outputs
    print(answer.text)
