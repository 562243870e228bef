"""Train the bundled model and its draft: `python -m fxlm.models.bundled.train`.

Half the rows are Python text, half are conversations on which loss is taken on
the assistant's answers alone. The conversations are at first mostly of the
kinds that copy; while the rate falls they are three quarters of the rows, up to
a last stretch of longer rows. Hidden matrices are stepped by Muon, the rest by
AdamW. The rate is held and then falls linearly to zero (WSD), so a run can be
lengthened by resuming from the checkpoint kept where the fall began. The draft
learns the main model's distribution beside the text.

The budget counts tokens, or minutes of processor time, all threads together:
neither passes while the process is suspended or waits for a busy machine. See
`data` for the text and `tasks` for the chat tasks.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import LlamaConfig, LlamaForCausalLM

from fxlm.models.bundled import BUNDLED
from fxlm.models.bundled.data import (
    BOS,
    EOS,
    PAD,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    corpus,
    encode_documents,
    packed_chat,
    train_tokenizer,
)
from fxlm.models.bundled.files import MAX_POSITIONS, export, load_checkpoint, save_checkpoint

CHAT_TOKEN_WEIGHT = 2.0  # a chat row has 40 % learned tokens, a text row all


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of one of the two models and its learning rates."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    muon_rate: float
    adam_rate: float

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=SPECIAL_TOKENS.index(BOS),
            eos_token_id=SPECIAL_TOKENS.index(EOS),
            pad_token_id=SPECIAL_TOKENS.index(PAD),
        )


SHAPES: dict[str, Shape] = {
    "bundled": Shape(
        hidden=256, layers=5, intermediate=704, heads=4, kv_heads=2, muon_rate=6e-3, adam_rate=4e-3
    ),
    "bundled-draft": Shape(
        hidden=64, layers=3, intermediate=176, heads=2, kv_heads=1, muon_rate=1e-2, adam_rate=6e-3
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """The batches of a stretch of training. `copying`: chat rows mostly copy."""

    rows: int
    num_chat: int
    length: int
    copying: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The budget and the batch. Just one of `minutes` and `tokens` is set."""

    minutes: float | None
    tokens: int | None
    batch_tokens: int = 4096
    length: int = 512
    warmup_steps: int = 100
    copying_until: float = 0.3
    decay_from: float
    long_from: float = 0.9
    long_length: int = 1024

    def phase(self, share: float) -> Phase:
        """What the batches are at this share: see the module docstring."""
        length = self.long_length if share >= self.long_from else self.length
        rows = self.batch_tokens // length
        # Text alone has documents of more than a few hundred tokens.
        mostly_chat = self.decay_from <= share < self.long_from
        num_chat = rows * 3 // 4 if mostly_chat else rows // 2
        return Phase(
            rows=rows, num_chat=num_chat, length=length, copying=share < self.copying_until
        )


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a run is: what is saved with it."""

    step: int = 0
    tokens: int = 0
    cpu_s: float = 0.0
    average: float = 0.0  # of the loss, over about 50 steps
    history: list[dict[str, float]] = field(default_factory=list)

    def share(self, plan: Plan) -> float:
        """Share of the budget that is spent, 0 to 1."""
        if plan.tokens is not None:
            return min(1.0, self.tokens / plan.tokens)
        assert plan.minutes is not None, plan
        return min(1.0, self.cpu_s / (60 * plan.minutes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """tokens and their positions in their document [rows, length].

    And of the learned tokens their flat positions, targets and weights [learned].
    """

    tokens: Tensor
    position_ids: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor


Loss = Callable[[Batch], Tensor]


def rate_scale(share: float, step: int, plan: Plan) -> float:
    """Warm up, hold, then fall linearly to zero."""
    warm = min(1.0, (step + 1) / plan.warmup_steps)
    return warm * min(1.0, max(0.0, (1.0 - share) / (1.0 - plan.decay_from)))


# --- batches --------------------------------------------------------------------


def positions_in_document(tokens: Tensor) -> Tensor:
    """Counts from the last begin token; transformers masks across a fall in them."""
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    starts = torch.where(tokens == SPECIAL_TOKENS.index(BOS), places, 0)
    return places - starts.cummax(1).values


class Batches:
    """Batches of one row length, chat rows and then text rows, fixed sizes."""

    def __init__(self, corpora: Corpora, phase: Phase, *, seed: int) -> None:
        self.stream, self.length, self.num_chat = corpora.stream, phase.length, phase.num_chat
        self.num_text = phase.rows - phase.num_chat
        self.chat = packed_chat(
            corpora.tokenizer, seed=seed, length=phase.length, copying=phase.copying
        )
        self.generator = torch.Generator().manual_seed(seed)
        # Fixed, so that the compiled step sees one shape; 40 % of a chat row is learned.
        self.num_learned = self.num_text * self.length + self.num_chat * self.length // 2

    def text_rows(self, rows: int) -> Iterator[tuple[list[int], list[bool]]]:
        starts = torch.randint(
            0, len(self.stream) - self.length - 1, (rows,), generator=self.generator
        )
        for start in starts.tolist():
            yield self.stream[start : start + self.length + 1].tolist(), [True] * (self.length + 1)

    def __next__(self) -> Batch:
        pairs = [next(self.chat) for _ in range(self.num_chat)]
        pairs += self.text_rows(self.num_text)
        tokens = torch.tensor([ids for ids, _ in pairs])
        learned = torch.tensor([flags for _, flags in pairs])[:, 1:]  # of the target
        weight = torch.ones(learned.shape)
        weight[: self.num_chat] = CHAT_TOKEN_WEIGHT
        positions = learned.reshape(-1).nonzero()[:, 0][-self.num_learned :]
        weights = weight.reshape(-1)[positions]
        short = self.num_learned - len(positions)
        positions = torch.cat([positions, positions.new_zeros(short)])
        weights = torch.cat([weights, weights.new_zeros(short)])
        return Batch(
            tokens=tokens[:, :-1].contiguous(),
            position_ids=positions_in_document(tokens[:, :-1]),
            positions=positions,
            targets=tokens[:, 1:].reshape(-1)[positions],
            weights=weights / weights.sum(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpora:
    """The tokenizer, the training stream [tokens], held-out rows [32, 257]."""

    tokenizer: Tokenizer
    stream: Tensor
    held_out: Tensor


def load_corpora(tokenizer: Tokenizer) -> Corpora:
    """Encode the text of this Python installation."""
    documents = corpus()
    stream = torch.tensor(encode_documents(tokenizer, [d for d in documents if not d.held_out]))
    rest = torch.tensor(encode_documents(tokenizer, [d for d in documents if d.held_out]))
    rows = rest[: len(rest) // 257 * 257].view(-1, 257)
    print(f"text: {len(stream)} training tokens, {len(rest)} held out", flush=True)
    return Corpora(
        tokenizer=tokenizer, stream=stream, held_out=rows[:: max(1, len(rows) // 32)][:32]
    )


# --- the step -------------------------------------------------------------------


def build(shape: Shape) -> LlamaForCausalLM:
    """A fresh model. Compiled, plain attention is faster than SDPA here.

    Measured on two Zen 5 cores, bf16, 16 rows of 256: 18.1 against 14.9 ktok/s.
    """
    config = shape.config()
    config._attn_implementation = "eager"
    model: LlamaForCausalLM = LlamaForCausalLM(config)
    model.train()
    return model


def logits_of(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Logits [learned, vocab] at the learned positions alone."""
    hidden = model.model(
        input_ids=batch.tokens, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state
    logits: Tensor = model.lm_head(hidden.reshape(-1, hidden.shape[-1])[batch.positions])
    return logits.float()


def loss_function(model: LlamaForCausalLM, teacher: LlamaForCausalLM | None) -> Loss:
    """The compiled loss: cross-entropy, averaged with KL to a teacher if any."""

    def loss(batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = logits_of(model, batch)
        hard = (cross_entropy(logits, batch.targets, reduction="none") * batch.weights).sum()
        if teacher is None:
            return hard
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            wanted = log_softmax(logits_of(teacher, batch), -1)
        soft = kl_div(log_softmax(logits, -1), wanted, reduction="none", log_target=True).sum(-1)
        return 0.3 * hard + 0.7 * (soft * batch.weights).sum()

    compiled: Loss = torch.compile(loss, dynamic=False)
    return compiled


def optimizers(model: LlamaForCausalLM, shape: Shape) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024) for the layers' matrices, AdamW for the others."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in named if not (p.ndim == 2 and ".layers." in name)]
    steppers = [
        torch.optim.Muon(matrices, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    for stepper, rate in zip(steppers, (shape.muon_rate, shape.adam_rate), strict=True):
        stepper.param_groups[0]["base_rate"] = rate
    return steppers


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, rows: Tensor) -> float:
    """Mean cross-entropy over the held-out rows [rows, length + 1]."""
    total = 0.0
    for part in rows.split(8):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=part[:, :-1], use_cache=False).logits
        total += float(
            cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        )
    return total / rows[:, 1:].numel()


# --- the run --------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Run:
    """One model in training, with all that a checkpoint holds."""

    name: str
    model: LlamaForCausalLM
    steppers: list[torch.optim.Optimizer]
    progress: Progress

    def save(self, path: Path) -> None:
        save_checkpoint(path, self.model, self.steppers, asdict(self.progress))

    def load(self, path: Path) -> None:
        self.progress = Progress(**load_checkpoint(path, self.model, self.steppers))


def take_step(run: Run, loss: Loss, batch: Batch, scale: float) -> float:
    """One optimizer step at `scale` of the base rates. Returns the loss."""
    value = loss(batch)
    value.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for stepper in run.steppers:
        for group in stepper.param_groups:
            group["lr"] = group["base_rate"] * scale
        stepper.step()
        stepper.zero_grad()
    return float(value.detach())


def report(run: Run, plan: Plan, corpora: Corpora, work: Path) -> None:
    """Every 100 steps print, every 400 measure on held-out text and save."""
    progress, name = run.progress, run.name
    if progress.step % 100 == 0:
        rate = progress.tokens / progress.cpu_s
        print(
            f"{name} step {progress.step} share {progress.share(plan):.3f} "
            f"loss {progress.average:.3f} {rate:.0f} tok/s",
            flush=True,
        )
    if progress.step % 400 == 0:
        held_out = held_out_loss(run.model, corpora.held_out)
        figures = {"step": progress.step, "train": progress.average, "held_out_text": held_out}
        progress.history.append(figures)
        print(f"{name} step {progress.step} held-out text loss {held_out:.3f}", flush=True)
        run.save(work / f"{name}.safetensors")


def train(run: Run, plan: Plan, corpora: Corpora, loss: Loss, work: Path) -> None:
    """Step until the budget is spent."""
    progress = run.progress
    phase: Phase | None = None
    while (share := progress.share(plan)) < 1.0:
        if phase != plan.phase(share):
            phase = plan.phase(share)
            batches = Batches(corpora, phase, seed=1000 + progress.step)
        started = time.process_time()
        value = take_step(run, loss, next(batches), rate_scale(share, progress.step, plan))
        progress.cpu_s += time.process_time() - started
        progress.step += 1
        progress.tokens += plan.batch_tokens
        progress.average = 0.98 * progress.average + 0.02 * value if progress.step > 1 else value
        if share < plan.decay_from <= progress.share(plan):
            run.save(work / f"{run.name}-stable.safetensors")
        report(run, plan, corpora, work)
    run.save(work / f"{run.name}.safetensors")


# --- the command -----------------------------------------------------------------


def stored_tokenizer(retrain: bool) -> Tokenizer:
    """The tokenizer in the repository; trained anew if asked or missing."""
    path = BUNDLED["bundled"] / "tokenizer.json"
    if path.exists() and not retrain:
        return Tokenizer.from_file(str(path))
    return train_tokenizer()


def start(name: str, resume: Path | None) -> Run:
    model = build(SHAPES[name])
    run = Run(name=name, model=model, steppers=optimizers(model, SHAPES[name]), progress=Progress())
    if resume is not None:
        run.load(resume)
        print(f"resumed {name} at step {run.progress.step}", flush=True)
    return run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="processor minutes for this model")
    budget.add_argument("--tokens", type=int, help="tokens for this model")
    parser.add_argument(
        "--model", choices=sorted(SHAPES), default="bundled", help="train the main model first"
    )
    parser.add_argument(
        "--decay-from", type=float, default=0.7, help="share of the budget where the rate falls"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--work", type=Path, default=Path("build/bundled"), help="folder for checkpoints"
    )
    parser.add_argument("--resume", type=Path, help="a checkpoint of this model to go on from")
    parser.add_argument("--retrain-tokenizer", action="store_true")
    parser.add_argument(
        "--no-teacher", action="store_true", help="train the draft on the text alone"
    )
    return parser.parse_args()


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    corpora = load_corpora(stored_tokenizer(given.retrain_tokenizer))
    run = start(given.model, given.resume)
    teacher: Any = None
    if given.model == "bundled-draft" and not given.no_teacher:
        teacher = LlamaForCausalLM.from_pretrained(
            BUNDLED["bundled"], dtype=torch.bfloat16, attn_implementation="eager"
        ).eval()
    plan = Plan(minutes=given.minutes, tokens=given.tokens, decay_from=given.decay_from)
    train(run, plan, corpora, loss_function(run.model, teacher), given.work)
    export(run.model, corpora.tokenizer, BUNDLED[given.model])
    summary = {
        "tokens": run.progress.tokens,
        "steps": run.progress.step,
        "cpu_s": round(run.progress.cpu_s),
        "history": run.progress.history,
    }
    (given.work / f"{given.model}-summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
