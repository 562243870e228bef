"""Measure the bundled models: `python -m fxlm.models.bundled.evaluate [--write]`.

Perplexity and bits per byte on the held-out files of this Python's standard
library, the score on held-out problems of each task kind (greedy decoding in
Hugging Face transformers), and how often the draft's first choice is the main
model's. `--write` stores `evaluation.json` and the table of the README.

The text depends on the Python version, which is stored with the figures. To
measure another engine on the same problems, pass its answers to
`tasks.score_tasks`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from fxlm.models.bundled import BUNDLED
from fxlm.models.bundled.data import Document, corpus
from fxlm.models.bundled.tasks import GENERATORS, held_out_tasks, messages, score_tasks

HERE = Path(__file__).parent
RESULTS = HERE / "evaluation.json"
README = HERE / "README.md"
OPEN_MARK, CLOSE_MARK = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"
WINDOW = 1024  # the longest row in training
MAX_NEW_TOKENS = 96  # the longest reference answer has fewer
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What is measured of one model. Scores are shares, 0 to 1."""

    parameters: int
    perplexity: float
    bits_per_byte: float
    tasks: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model and its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def bos(self) -> int:
        return int(self.tokenizer.bos_token_id)

    @property
    def eos(self) -> int:
        return int(self.tokenizer.eos_token_id)


def load(name: str, dtype: torch.dtype = torch.float32) -> Loaded:
    """The bundled model `name`, its bf16 weights widened to `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(BUNDLED[name], dtype=dtype).eval()
    return Loaded(model=model, tokenizer=AutoTokenizer.from_pretrained(BUNDLED[name]))


def windows(loaded: Loaded, documents: Sequence[Document]) -> list[Tensor]:
    """Each document's tokens, opened and closed, cut into windows that overlap by one."""
    found = []
    for document in documents:
        ids = loaded.tokenizer.encode(document.text, add_special_tokens=False, verbose=False)
        whole = torch.tensor([loaded.bos, *ids, loaded.eos])
        found += [whole[start : start + WINDOW + 1] for start in range(0, len(whole) - 1, WINDOW)]
    return found


@torch.inference_mode()
def text_loss(loaded: Loaded, documents: Sequence[Document]) -> tuple[float, int]:
    """Summed negative log-likelihood in nats, and the number of tokens it is over."""
    total, number = 0.0, 0
    for window in windows(loaded, documents):
        logits = loaded.model(input_ids=window[None, :-1]).logits[0].float()
        total += float(cross_entropy(logits, window[1:], reduction="sum"))
        number += len(window) - 1
    return total, number


def prompt_ids(loaded: Loaded, conversation: list[dict[str, str]]) -> list[int]:
    """The conversation through the chat template, up to the answer."""
    text = loaded.tokenizer.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = loaded.tokenizer.encode(text, add_special_tokens=False)
    return ids


@torch.inference_mode()
def greedy_ids(loaded: Loaded, prompts: Sequence[list[int]], batch: int = 50) -> list[list[int]]:
    """Greedy answers' tokens, without the end token; left-padded batches."""
    answers: list[list[int]] = []
    pad = int(loaded.tokenizer.pad_token_id)
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        width = max(map(len, part))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in part])
        made = loaded.model.generate(
            input_ids=ids,
            attention_mask=(ids != pad).long(),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
        )  # [batch, width + new]
        for row in made[:, width:].tolist():
            answers.append(row[: row.index(loaded.eos)] if loaded.eos in row else row)
    return answers


def answerer(loaded: Loaded) -> Callable[[Sequence[list[dict[str, str]]]], list[str]]:
    """Conversations in, greedy answers out."""

    def answer(conversations: Sequence[list[dict[str, str]]]) -> list[str]:
        prompts = [prompt_ids(loaded, conversation) for conversation in conversations]
        return [str(loaded.tokenizer.decode(ids)) for ids in greedy_ids(loaded, prompts)]

    return answer


def measure(name: str, number: int, dtype: torch.dtype) -> Figures:
    """All the figures of one model."""
    loaded = load(name, dtype)
    documents = [document for document in corpus() if document.held_out]
    nats, tokens = text_loss(loaded, documents)
    num_bytes = sum(len(document.text.encode()) for document in documents)
    return Figures(
        parameters=sum(p.numel() for p in loaded.model.parameters()),
        perplexity=round(math.exp(nats / tokens), 3),
        bits_per_byte=round(nats / math.log(2) / num_bytes, 4),
        tasks={
            kind: round(score, 3) for kind, score in score_tasks(answerer(loaded), number).items()
        },
    )


@torch.inference_mode()
def agreement(main: Loaded, draft: Loaded, per_kind: int) -> float:
    """Share of the main model's greedy tokens that are the draft's first choice."""
    tasks = [task for kind in GENERATORS for task in held_out_tasks(kind, per_kind)]
    prompts = [prompt_ids(main, messages(task)) for task in tasks]
    same, number = 0, 0
    for prompt, answer in zip(prompts, greedy_ids(main, prompts), strict=True):
        answer = [*answer, main.eos]
        logits = draft.model(input_ids=torch.tensor([prompt + answer])).logits[0]
        chosen = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        same += sum(a == b for a, b in zip(chosen, answer, strict=True))
        number += len(answer)
    return same / number


def table(results: dict[str, Any]) -> str:
    """The figures as a Markdown table, a column a model."""
    names = list(results["models"])
    columns = [results["models"][name] for name in names]

    def row(label: str, cells: list[str]) -> str:
        return f"| {label} | {' | '.join(cells)} |"

    lines = [row("", [f"`{name}`" for name in names]), "|---" * (len(names) + 1) + "|"]
    lines.append(row("parameters", [f"{column['parameters']:,}" for column in columns]))
    lines.append(
        row("held-out text, perplexity a token", [f"{c['perplexity']:.2f}" for c in columns])
    )
    lines.append(row("held-out text, bits a byte", [f"{c['bits_per_byte']:.3f}" for c in columns]))
    for kind in columns[0]["tasks"]:
        lines.append(row(f"task: {kind}", [f"{100 * c['tasks'][kind]:.1f} %" for c in columns]))
    agreed = 100 * results["draft_agreement"]
    lines += [
        "",
        f"The draft's first choice is the main model's on {agreed:.1f} % of the tokens of "
        "its answers. "
        f"{results['problems_per_kind']} held-out problems a kind, greedy, {results['dtype']}; "
        f"text of Python {results['python']}.",
    ]
    return "\n".join(lines)


def write(results: dict[str, Any]) -> None:
    """Store the figures and put their table between the README's marks."""
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    text = README.read_text()
    head, rest = text.split(OPEN_MARK)
    tail = rest.split(CLOSE_MARK)[1]
    README.write_text(f"{head}{OPEN_MARK}\n{table(results)}\n{CLOSE_MARK}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--number", type=int, default=300, help="held-out problems a task kind")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument(
        "--write", action="store_true", help="rewrite evaluation.json and the README table"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dtype = DTYPES[given.dtype]
    results: dict[str, Any] = {
        "python": platform.python_version(),
        "dtype": given.dtype,
        "problems_per_kind": given.number,
        "models": {name: asdict(measure(name, given.number, dtype)) for name in BUNDLED},
        "draft_agreement": round(
            agreement(
                load("bundled", dtype), load("bundled-draft", dtype), max(1, given.number // 6)
            ),
            4,
        ),
    }
    print(table(results))
    if given.write:
        write(results)


if __name__ == "__main__":
    main()
