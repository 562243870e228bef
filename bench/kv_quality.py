"""What the type of the KV cache costs in quality. ``python bench/kv_quality.py [MODEL]``

Log-probabilities of the tokens of held-out files (the bundled model has not seen them), with each
type of cache in turn and all else equal: mean and 99th percentile of absolute differences
to those with the cache in the activations' type, and the perplexities. The last column, differences
to float32 everywhere, shows what bfloat16 itself costs.

Writes ``bench/results/kv_quality.json``. Speed is measured in ``attention.py``.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from common import print_table, write_results
from fxlm import LLM, SamplingParams
from fxlm.models.bundled.data import corpus

KINDS = ("auto", "int8", "fp8")
CHARACTERS = 2500  # of each file


def logprobs(model: str, texts: list[str], **options: Any) -> torch.Tensor:
    """Of every token of the texts but the first of each; float64."""
    llm = LLM(model, enforce_eager=True, **options)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    found = []
    for result in llm.generate(texts, params, use_tqdm=False):
        positions = (result.prompt_logprobs or [])[1:]
        tokens = (result.prompt_token_ids or [])[1:]
        pairs = zip(positions, tokens, strict=True)
        found += [place[token].logprob for place, token in pairs if place is not None]
    return torch.tensor(found, dtype=torch.float64)


def row(
    kind: str, found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor
) -> dict[str, object]:
    """One line of the table."""
    error = (found - plain).abs()
    return {
        "cache": kind,
        "tokens": len(found),
        "perplexity": math.exp(-float(found.mean())),
        "mean_error": float(error.mean()),
        "p99_error": float(error.quantile(0.99)),
        "mean_error_to_float32": float((found - exact).abs().mean()),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="bundled")
    parser.add_argument("--files", type=int, default=24)
    parser.add_argument("--output", type=Path, default=None, help="instead of bench/results/")
    options = parser.parse_args()
    documents = [d for d in corpus() if d.held_out and len(d.text) >= CHARACTERS]
    texts = [d.text[:CHARACTERS] for d in documents[: options.files]]
    exact = logprobs(options.model, texts, dtype="float32")
    plain = logprobs(options.model, texts)
    rows = [row("auto", plain, plain, exact)]
    for kind in KINDS[1:]:
        rows.append(row(kind, logprobs(options.model, texts, kv_cache_dtype=kind), plain, exact))
    print_table(rows, title="Log-probabilities by type of the KV cache")
    settings = {"model": options.model, "files": len(texts), "characters": CHARACTERS}
    path = write_results("kv_quality", rows, options=settings, output=options.output)
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
