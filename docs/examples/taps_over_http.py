"""Taps and steering over the API; the address of the server is the argument."""

import base64
import sys

import numpy as np
from openai import OpenAI

POINT = "model.layers.0"


def hidden_states(client, **extra):
    """float32 [tokens, H] of the prompt and the answer but its last token."""
    reply = client.completions.create(
        model="bundled-draft",
        prompt="def add(a, b):",
        temperature=0,
        max_tokens=4,
        extra_body={"taps": [POINT], "tap_prompt": True, **extra},
    )
    tapped = reply.choices[0].model_extra["taps"][POINT]
    return np.frombuffer(base64.b64decode(tapped["data"]), "<f4").reshape(tapped["shape"])


if __name__ == "__main__":
    with OpenAI(base_url=sys.argv[1], api_key="none") as client:
        plain = hidden_states(client)
        steered = hidden_states(client, steer={POINT: [0.5] * plain.shape[1]})
    print(plain.shape, (steered - plain)[0, :4])
