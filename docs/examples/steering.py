"""Steer one request of two by the difference that two prompts make behind a layer."""

from fxlm import LLM, SamplingParams

POINT = "model.layers.1"
PROMPT = "def add(a, b):"

if __name__ == "__main__":
    llm = LLM("bundled-draft", tap=[POINT], steer=[POINT], dtype="float32", enforce_eager=True)

    # A tap without the prompt has a row for each new token: here that of the last prompt token.
    look = SamplingParams(temperature=0, max_tokens=1, taps=[POINT])
    there, here = (
        output.outputs[0].taps[POINT][0] for output in llm.generate(["import os", PROMPT], look)
    )
    vector = there - here  # float32 [H]

    options = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    steered = SamplingParams(**options, steer={POINT: vector.tolist()})
    for output in llm.generate([PROMPT, PROMPT], [SamplingParams(**options), steered]):
        print(repr(output.outputs[0].text))
