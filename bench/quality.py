"""What quantization costs: perplexity and task scores of the bundled model under every scheme.

One table, one run: each row is the model served by the engine (graph interpreted, kernels as
served) on the same held-out text and the same held-out problems, greedy: rounded while loading, or
read from a checkpoint that the format's own code wrote (`make_quantized`). The change of the
perplexity is paired over windows of text against the row ``bfloat16``, with its standard error; a
task score has the standard error of a share. ``int8, plain PyTorch`` is what the scheme costs by
its definition: transformers' model with weights and inputs rounded, nothing of the engine in it.

Rows are kept in bench/results/quality.json as they are measured; those that are there already with
the same options are not measured again. A format whose library is not there is left out, which is
said; checkpoints in ``--checkpoints`` are taken as they are. ``--docs`` also puts the table into
docs/quantization.md. One thread: waiting for each other would cost two more than they bring.

    python bench/quality.py [--windows N] [--problems N] [--only 'ROW;ROW'] [--docs]
                            [--checkpoints DIR] [--llama-quantize PROGRAM]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, write_results
from fxlm.models.bundled import BUNDLED
from fxlm.models.bundled.data import corpus
from fxlm.models.bundled.tasks import score_tasks
from fxlm.models.tokenizer import Tokenizer
from fxlm.runtime.llm import LLM
from fxlm.runtime.sampling_params import SamplingParams
from make_quantized import FORMATS, make

DOCS = Path(__file__).resolve().parent.parent / "docs" / "quantization.md"
OPEN_MARK, CLOSE_MARK = "<!-- quality: begin -->", "<!-- quality: end -->"
WINDOW = 1024
PLAIN = "int8, plain PyTorch"
BASE = "bfloat16"  # what the other rows are held against
# Row -> options of the engine.
ROWS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "float32": {"dtype": "float32"},
    "int8": {"quantization": "int8"},
    "int8, head too": {"quantization": "int8,head=int8"},
    "int8wo": {"quantization": "int8wo"},
    "fp8": {"quantization": "fp8"},
    "fp8-channel": {"quantization": "fp8-channel"},
    "fp8-block": {"quantization": "fp8-block"},
    "int4": {"quantization": "int4"},
    "int4-g32": {"quantization": "int4-g32"},
    "int4a8": {"quantization": "int4a8"},
    "int4a8-g32": {"quantization": "int4a8-g32"},
    "int4-g32, down_proj int8": {"quantization": "int4-g32,down_proj=int8wo"},
    "KV cache int8": {"kv_cache_dtype": "int8"},
    "KV cache fp8": {"kv_cache_dtype": "fp8"},
    "int8, KV cache int8": {"quantization": "int8", "kv_cache_dtype": "int8"},
    PLAIN: {},
    **{name: {} for name in FORMATS},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What one row measured.

    Attributes:
        row: its name.
        weight_mib: prepared weights.
        losses: mean negative log-likelihood of each window, in nats.
        tasks: share of problems solved, by kind; empty if it was not asked.
    """

    row: str
    weight_mib: float
    losses: list[float]
    tasks: dict[str, float]

    @property
    def perplexity(self) -> float:
        """Over all windows."""
        return math.exp(statistics.fmean(self.losses))

    @property
    def solved(self) -> float:
        """Share of all problems; each kind has as many."""
        return statistics.fmean(self.tasks.values())

    def change(self, base: Quality) -> tuple[float, float]:
        """Of the perplexity against another row, as a share (0.01 is 1 % worse); its error."""
        apart = [a - b for a, b in zip(self.losses, base.losses, strict=True)]
        share = math.expm1(statistics.fmean(apart))
        return share, (1 + share) * statistics.stdev(apart) / math.sqrt(len(apart))


def windows(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Token windows of held-out documents, each opened by token 0, spread over the corpus."""
    found = []
    for document in corpus():
        if document.held_out:
            ids = tokenizer.encode(document.text, add_special_tokens=False)
            found += [[0, *ids[i : i + WINDOW - 1]] for i in range(0, len(ids), WINDOW - 1)]
    whole = [window for window in found if len(window) == WINDOW]
    step = max(len(whole) // count, 1)
    return whole[::step][:count]


def losses(llm: LLM, texts: Sequence[list[int]]) -> list[float]:
    """Mean negative log-likelihood of each window, in nats."""
    score = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    outputs = llm.generate([list(t) for t in texts], score, use_tqdm=False)
    result = []
    for output in outputs:
        entries = [entry for entry in output.prompt_logprobs or [] if entry]
        values = [next(iter(entry.values())).logprob for entry in entries]
        assert len(values) == WINDOW - 1, len(values)
        result.append(-statistics.fmean(values))
    return result


def scores(llm: LLM, number: int) -> dict[str, float]:
    """Share of the held-out problems that the greedy answers solve, by kind."""
    params = SamplingParams(temperature=0.0, max_tokens=96)

    def answer(conversations: Sequence[list[dict[str, str]]]) -> list[str]:
        made = llm.chat(conversations, params, use_tqdm=False)
        return [output.outputs[0].text for output in made]

    return score_tasks(answer, number)


def measure(row: str, model: str, num_windows: int, problems: int) -> Quality:
    """One row of the table."""
    llm = LLM(
        model, enforce_eager=True, max_num_seqs=256, max_model_len=WINDOW + 128,
        max_num_batched_tokens=4096, kv_cache_memory_bytes=1 << 29, threads=1,
        enable_prefix_caching=False, **ROWS[row],
    )  # fmt: skip
    mib = sum(w.nbytes for w in llm.artifact.weights().values()) / 2**20
    return Quality(
        row=row,
        weight_mib=round(mib, 2),
        losses=[round(loss, 6) for loss in losses(llm, windows(llm.get_tokenizer(), num_windows))],
        tasks={kind: round(share, 4) for kind, share in scores(llm, problems).items()},
    )


@torch.no_grad()
def plain(num_windows: int) -> Quality:
    """The scheme ``int8`` by its definition, on transformers' model in bfloat16."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    path = BUNDLED["bundled"]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.copy_(_rounded(module.weight))
            module.register_forward_pre_hook(lambda _, given: (_rounded(given[0]),))
    found = []
    for window in windows(Tokenizer.open(path), num_windows):
        ids = torch.tensor([window])
        logits = model(ids).logits[0, :-1].float()
        found.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
    return Quality(row=PLAIN, weight_mib=0.0, losses=[round(x, 6) for x in found], tasks={})


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """[rows, columns], each row to 255 steps of its largest magnitude / 127."""
    scale = values.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return ((values.float() / scale).round() * scale).to(values.dtype)


def table(rows: Sequence[Quality], problems: int) -> str:
    """The figures as a Markdown table, in the order of `ROWS`."""
    base = next(q for q in rows if q.row == BASE)
    kinds = list(base.tasks)
    heads = ["", "weights, MiB", "perplexity", "change", "tasks solved", *kinds]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for q in sorted(rows, key=lambda q: list(ROWS).index(q.row)):
        share, error = q.change(base)
        cells = [
            q.row, f"{q.weight_mib:.2f}" if q.weight_mib else "", f"{q.perplexity:.3f}",
            "" if q.row == BASE else f"{100 * share:+.2f} ± {100 * error:.2f} %",
            *(_task_cells(q, problems) if q.tasks else [""] * (1 + len(kinds))),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _task_cells(q: Quality, problems: int) -> list[str]:
    """Of all kinds together, then of each."""
    spread = math.sqrt(q.solved * (1 - q.solved) / (problems * len(q.tasks)))
    return [f"{100 * q.solved:.1f} ± {100 * spread:.1f} %",
            *(f"{100 * share:.1f}" for share in q.tasks.values())]  # fmt: skip


def known(options: dict[str, int]) -> list[Quality]:
    """Rows measured before with these options."""
    path = RESULTS / "quality.json"
    document = json.loads(path.read_text()) if path.is_file() else {}
    if document.get("options") != options:
        return []
    return [Quality(**row) for row in document["results"]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=120, help=f"of {WINDOW} tokens")
    parser.add_argument("--problems", type=int, default=30, help="held-out problems a task kind")
    parser.add_argument("--only", default=";".join(ROWS), help="rows, separated by ;")
    parser.add_argument("--docs", action="store_true", help="rewrite the table of the docs")
    parser.add_argument("--checkpoints", type=Path, help="where they are, or are written")
    parser.add_argument("--llama-quantize", metavar="PROGRAM", help="of llama.cpp")
    given = parser.parse_args()
    options = {"windows": given.windows, "problems": given.problems, "window": WINDOW}
    rows = known(options)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.checkpoints or Path(scratch)
        for row in dict.fromkeys([BASE, *given.only.split(";")]):
            if row in [q.row for q in rows]:
                continue
            try:
                model = make(row, folder, given.llama_quantize) if row in FORMATS else "bundled"
            except ImportError as error:
                print(f"{row}: left out, {error}")
                continue
            rows.append(
                plain(given.windows) if row == PLAIN
                else measure(row, str(model), given.windows, given.problems)
            )  # fmt: skip
            write_results("quality", [asdict(q) for q in rows], options=options)
    text = table(rows, given.problems)
    print(text)
    if given.docs:
        before, rest = DOCS.read_text().split(OPEN_MARK)
        after = rest.split(CLOSE_MARK)[1]
        note = f"{given.windows} windows of {WINDOW} tokens, {given.problems} problems a kind."
        DOCS.write_text(f"{before}{OPEN_MARK}\n{text}\n\n{note}\n{CLOSE_MARK}{after}")


if __name__ == "__main__":
    main()
