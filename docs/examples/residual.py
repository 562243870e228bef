"""Tap the residual stream behind the middle layer, and take it from LLM.generate."""

from fxlm import LLM, SamplingParams, graph_pass
from fxlm.compiler.rewrite import layer_paths, module_output


@graph_pass(before="paged_attention", expects=1)
def tap_middle(program):
    """before: return logits   after: return logits, h   the output of a layer, [T, H]"""
    layers = layer_paths(program)
    program.tap("middle", module_output(program, layers[len(layers) // 2]))
    return 1


if __name__ == "__main__":
    llm = LLM("bundled-draft", passes=[tap_middle], dtype="float32", enforce_eager=True)
    params = SamplingParams(temperature=0, max_tokens=8, taps=["middle"], tap_prompt=True)
    (answer,) = llm.generate("def add(a, b):", params)[0].outputs
    rows = answer.taps["middle"]  # float32 [tokens of prompt and answer but the last, H]
    print(rows.shape, rows.std(axis=1))
