"""Coverage: every causal LM that transformers registers, tiny and random, through fxlm.

    python bench/model_coverage.py [--only llama,gpt2] [--jobs 2] [--compiled]
        [--json bench/results/coverage.json] [--markdown docs/models.md]

Each model type runs in a process of its own with a time and a memory limit. Stages: built
(on meta, with a binding of every tensor), captured (``torch.export``, T dynamic), attention
(ops in the graph), logits (two ragged sequences in one step equal Hugging Face's logits
of each alone, fp32), compiled (with ``--compiled``, and run), tokens (the engine's greedy
tokens equal ``generate``). The first stage that fails gives the reason. Written: JSON, and
the table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

STAGES = ("built", "captured", "attention", "logits", "compiled", "tokens")
MEMORY_BYTES = 12 << 30
TOLERANCE = 1e-3  # of the largest logit, fp32


def evaluate(
    checkpoint_dir: Path, *, check: bool = False, compiled: bool = False
) -> dict[str, Any]:
    """Take one checkpoint through the stages.

    Args:
        checkpoint_dir: as ``save_pretrained`` writes it, fp32.
        check: serve it too, on the references (seconds a model).
        compiled: and compiled (seconds to a minute a model).

    Returns:
        A key a stage (True, or absent from the first that failed on), ``reason`` ('' if none
        failed), ``num_attention`` ops and ``architecture``.
    """
    result: dict[str, Any] = {"reason": ""}
    try:
        _evaluate(Path(checkpoint_dir), result)
        if check and result.get("attention"):
            _check(Path(checkpoint_dir), result, compiled)
    except Exception as error:  # the reason is the result
        result["reason"] = _reason(error)
        if os.environ.get("FXLM_COVERAGE_TRACE"):
            traceback.print_exc()
    return result


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    kind = type(error).__name__
    return (text if kind in ("UnsupportedModel", "InvalidModel") else f"{kind}: {text}")[:400]


def _evaluate(path: Path, result: dict[str, Any]) -> None:
    import torch

    from fxlm.models.binding import bind
    from fxlm.models.build import build_model
    from fxlm.models.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    model = build_model(checkpoint, torch.float32)
    result["architecture"] = type(model).__name__
    binding = bind(checkpoint, model)
    result["built"] = True
    weights = binding.convert({name: checkpoint.read(name) for name in binding.names})
    program = _capture(model)
    result["captured"] = True
    nodes = [n for n in program.graph.nodes if str(n.target) == "fxlm.attention.default"]
    result["num_attention"] = len(nodes)
    if not nodes:
        result["reason"] = (
            "no attention op in the graph: it attends in code of its own, or not at all"
        )
        return
    result["attention"] = True
    result["reason"] = _compare(path, program, weights)
    result["logits"] = not result["reason"]


def _capture(model: Any) -> Any:
    import torch

    from fxlm.compiler.capture import capture
    from fxlm.compiler.program import Facts
    from fxlm.models.facts import facts

    found = facts(model)
    return capture(
        model,
        Facts(
            model_type=found.model_type,
            vocab_size=found.vocab_size,
            max_position_embeddings=found.max_position_embeddings,
            num_layers=found.num_layers,
            dtype=torch.float32,
            device=torch.device("cpu"),
        ),
    )


def _runner(program: Any, weights: dict[str, Any]) -> Any:
    """A function (ids [T], lengths) -> logits [T, V] that runs the captured graph eagerly."""
    import torch

    class Ragged(torch.fx.Interpreter):
        lengths: tuple[int, ...] = ()

        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if str(target) != "fxlm.attention.default":
                return super().call_function(target, args, kwargs)
            parts = zip(*(x.split(self.lengths, 2) for x in args[:3]), strict=True)
            return torch.cat([target(*part, *args[3:], **kwargs) for part in parts], 1)

    interpreter = Ragged(program.module)
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]

    def run(ids: Any, lengths: tuple[int, ...]) -> Any:
        positions = torch.cat([torch.arange(n) for n in lengths])
        tables = {
            "step": {"input_ids": ids[None], "position_ids": positions[None]},
            "weight": weights,
            "constant": program.constants,
        }
        inputs = [program.inputs[name] for name in names]
        interpreter.lengths = lengths
        with torch.no_grad():
            out = interpreter.run(*(tables[i.role][i.source] for i in inputs))
        return (out[0] if isinstance(out, (tuple, list)) else out)[0]

    return run


def _compare(path: Path, program: Any, weights: dict[str, Any]) -> str:
    """Compare logits with Hugging Face; returns what is wrong, '' if nothing."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(7)
    lengths = (11, 19)
    ids = torch.randint(3, 250, (sum(lengths),), generator=generator)
    with torch.no_grad():
        expected = [
            model(input_ids=part[None], use_cache=False).logits[0] for part in ids.split(lengths)
        ]
    run = _runner(program, weights)
    alone = _error(run(ids[: lengths[0]], lengths[:1]), expected[0])
    if alone > TOLERANCE:
        return f"logits of one sequence differ from transformers' by {alone:.1e} of the largest"
    ragged = _error(run(ids, lengths), torch.cat(expected))
    if ragged > TOLERANCE:
        return "tokens of a step mix outside attention (recurrence, convolution, own positions)"
    return ""


def _error(got: Any, want: Any) -> float:
    if not bool(want.isfinite().all()):
        return float("inf")
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


def _check(path: Path, result: dict[str, Any], compiled: bool) -> None:
    """The engine's greedy tokens against ``generate``, then those of the compiled engine."""
    from fxlm.runtime.check import evaluate as check

    row = check(path, compiled=compiled)
    failed = str(row["reason"])
    result["tokens"] = bool(row["tokens_equal"])
    result["compiled"] = bool(row["compiled"])
    if failed and not result["tokens"] and result.get("logits") and not _generate_is_greedy(path):
        failed = (
            "transformers' generate differs from the argmax of its own logits, which ours equal"
        )
    result["reason"] = result["reason"] or failed


def _generate_is_greedy(path: Path) -> bool:
    """Whether ``generate`` gives the tokens that the model's own logits rank first."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.randint(3, 250, (4, 9), generator=torch.Generator().manual_seed(11))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    with torch.no_grad():
        for _ in range(8):
            best = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, best[:, None]], 1)
    return bool(torch.equal(out, ids))


def _child(model_type: str, folder: str, out: str, how: dict[str, bool]) -> None:
    """Body of the forked process: write the checkpoint, evaluate it, write JSON."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    with open(os.devnull, "w") as null:
        if not os.environ.get("FXLM_COVERAGE_TRACE"):
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
    from fxlm.models.tiny import write_checkpoint

    try:
        write_checkpoint(model_type, folder)
        result = evaluate(Path(folder), **how)
    except BaseException as error:
        result = {"reason": f"no tiny checkpoint: {_reason(error)}"}
        if os.environ.get("FXLM_COVERAGE_TRACE"):
            traceback.print_exc()
    Path(out).write_text(json.dumps(result))


def run_one(model_type: str, seconds: float, how: dict[str, bool]) -> dict[str, Any]:
    """Evaluate one type in a forked process under its limits."""
    started = time.monotonic()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/result.json"
        process = context.Process(target=_child, args=(model_type, f"{folder}/m", out, how))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            result: dict[str, Any] = {"reason": f"took longer than {seconds:.0f} s"}
        elif Path(out).exists():
            result = json.loads(Path(out).read_text())
        else:
            result = {"reason": f"its process ended with code {process.exitcode}"}
    return {"model_type": model_type, **result, "seconds": round(time.monotonic() - started, 1)}


def _preload() -> None:
    """Import once what every forked process needs."""
    import warnings

    import torch
    import transformers

    from fxlm.models import attention, experts

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    attention.register()
    experts.register()
    torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))


def totals(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Number of rows that reached each stage."""
    return {stage: sum(bool(row.get(stage)) for row in rows) for stage in STAGES}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/models.md."""
    import torch
    import transformers

    counts = totals(rows)
    head = [
        "# Models",
        "",
        f"Every causal LM that transformers {transformers.__version__} registers ({len(rows)} "
        f"types), as a tiny random model through fxlm with torch {torch.__version__}; made by "
        "`python bench/model_coverage.py --compiled`.",
        "",
        "| stage | means | models |",
        "|---|---|---|",
        f"| built | built without weights, every tensor bound | {counts['built']} |",
        f"| captured | one graph over a ragged number of tokens | {counts['captured']} |",
        f"| attention | attends through fxlm's op | {counts['attention']} |",
        f"| logits | the graph's fp32 logits equal transformers', two sequences in a step | "
        f"{counts['logits']} |",
        f"| compiled | compiled, and run by the engine | {counts['compiled']} |",
        f"| tokens | the greedy tokens of that engine equal `generate` | {counts['tokens']} |",
        "",
        "| model type | " + " | ".join(STAGES) + " | why not |",
        "|---|" + "---|" * (len(STAGES) + 1),
    ]
    lines = []
    for row in rows:
        marks = ["yes" if row.get(stage) else "" for stage in STAGES]
        reason = re.sub(r"/\S*site-packages/", "", row["reason"])
        reason = reason.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {row['model_type']} | " + " | ".join(marks) + f" | {reason} |")
    return "\n".join([*head, *lines, ""])


def _known(path: Path | None) -> dict[str, dict[str, Any]]:
    """Rows of an earlier run, by model type."""
    if path is None or not path.exists():
        return {}
    return {row["model_type"]: row for row in json.loads(path.read_text())["models"]}


_writing = threading.Lock()


def _write(path: Path, known: dict[str, dict[str, Any]]) -> None:
    """Write all rows, so that a run that is cut off can be taken up again."""
    with _writing:
        rows = [known[name] for name in sorted(known)]
        text = json.dumps({"totals": totals(rows), "models": rows}, indent=1)
        path.with_suffix(".part").write_text(text + "\n")
        path.with_suffix(".part").replace(path)


def main(argv: list[str] | None = None) -> int:
    """Run the coverage and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="model types, comma separated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=300, help="limit for each model")
    parser.add_argument("--check", action="store_true", help="serve each model on references")
    parser.add_argument("--compiled", action="store_true", help="and compiled; implies --check")
    parser.add_argument("--json", type=Path, help="results; rows already there are kept")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(argv)
    _preload()
    from fxlm.models.tiny import model_types

    types = options.only.split(",") if options.only else model_types()
    how = {"check": options.check or options.compiled, "compiled": options.compiled}
    known = _known(options.json)

    def one(model_type: str) -> dict[str, Any]:
        row = known.get(model_type) or run_one(model_type, options.seconds, how)
        known[model_type] = row
        if options.json:
            _write(options.json, known)
        done = next((s for s in reversed(STAGES) if row.get(s)), "-")
        print(f"{model_type:32} {done:10} {row['seconds']:6} s  {row['reason'][:150]}", flush=True)
        return row

    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(one, types))
    print(json.dumps(totals(rows)))
    if options.markdown:
        options.markdown.write_text(markdown(rows))
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
