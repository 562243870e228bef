"""Training text and its held-out split, conversations, tokenizer, packing.

The text is what a Python installation carries: the source of the standard
library, the language reference inside `pydoc_data`, and the docstrings of
built-in modules. Files are split by a hash of their relative path. Test
suites and generated tables are left out; so is whatever a distribution may
not install.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fxlm.models.bundled.tasks import COPYING_WEIGHTS, WEIGHTS, training_tasks

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SYSTEM, USER, ASSISTANT, TOOL = "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"
SPECIAL_TOKENS: tuple[str, ...] = (
    BOS,
    EOS,
    PAD,
    SYSTEM,
    USER,
    ASSISTANT,
    TOOL,
    *(f"<|reserved_{index}|>" for index in range(9)),
)
VOCAB_SIZE = 4096
TEXT_HELD_OUT_ONE_IN = 20

_SKIPPED = {
    *("test", "tests", "idlelib", "lib2to3", "encodings", "turtledemo", "ensurepip"),
    *("site-packages", "dist-packages", "pydoc_data", "__phello__"),
    "config-3.11-x86_64-linux-gnu",
}
_BUILT_IN_MODULES = (
    *("builtins", "math", "cmath", "itertools", "time", "zlib", "array", "binascii"),
    *("unicodedata", "gc", "marshal", "errno", "_struct", "_random", "_datetime", "_operator"),
    *("_functools", "_collections", "_io", "_csv", "_json", "_heapq", "_bisect", "select"),
)
_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful AI assistant.",
    "Answer briefly.",
    "You are fxlm.",
    "You are a concise assistant.",
    "Be helpful and honest.",
)

# One turn: a role marker, the text, the end marker. No newlines between, so
# that a turn costs two tokens beyond its text.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text of the corpus and the name that decides its split."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:4], "big") % TEXT_HELD_OUT_ONE_IN == 0


def _source_files() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        # `_sysconfigdata*` holds the paths of the machine that built Python.
        if not _SKIPPED & set(relative.parts) and not path.name.startswith("_sysconfigdata"):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield Document(name=relative.as_posix(), text=text)


def _reference_topics() -> Iterator[Document]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        yield Document(name=f"topics/{name}", text=text.strip() + "\n")


def _docstrings(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    for attribute, value in sorted(vars(module).items()):
        if attribute.startswith("_") or not (inspect.isclass(value) or callable(value)):
            continue
        yield f"{name}.{attribute}\n\n{inspect.getdoc(value) or ''}\n"
        if inspect.isclass(value):
            for method, function in sorted(vars(value).items()):
                if not method.startswith("_") and callable(function) and inspect.getdoc(function):
                    yield f"{name}.{attribute}.{method}\n\n{inspect.getdoc(function)}\n"


def _built_in_docs() -> Iterator[Document]:
    for name in _BUILT_IN_MODULES:
        yield Document(name=f"builtin/{name}", text="\n".join(_docstrings(name)))


def corpus() -> list[Document]:
    """Every document, held out or not, in a fixed order."""
    return [*_source_files(), *_reference_topics(), *_built_in_docs()]


# --- conversations ----------------------------------------------------------------


def system_prompt(rng: random.Random) -> str | None:
    """A system prompt three conversations in ten."""
    return rng.choice(_SYSTEM_PROMPTS) if rng.random() < 0.3 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of one conversation, and whether loss is taken on it."""

    text: str
    learned: bool


def conversations(seed: int, *, copying: bool = False) -> Iterator[list[Segment]]:
    """Conversations of one to three turns, spelled as the template does.

    `copying` gives one turn each, mostly of the kinds that copy.
    """
    rng = random.Random(seed)
    tasks = training_tasks(seed, COPYING_WEIGHTS if copying else WEIGHTS)
    while True:
        system = system_prompt(rng)
        head = BOS + (f"{SYSTEM}{system}{EOS}" if system else "")
        segments: list[Segment] = []
        for _ in range(1 if copying else rng.randint(1, 3)):
            task = next(tasks)
            segments.append(
                Segment(text=f"{head}{USER}{task.prompt}{EOS}{ASSISTANT}", learned=False)
            )
            segments.append(Segment(text=task.answer + EOS, learned=True))
            head = ""
        yield segments


# --- tokenizer --------------------------------------------------------------------


def _tokenizer_text(seed: int, share_chars: float = 0.3) -> Iterator[str]:
    documents = [document.text for document in corpus() if not document.held_out]
    yield from documents
    budget = share_chars * sum(map(len, documents))
    for segments in conversations(seed):
        for segment in segments:
            text = segment.text
            for special in (BOS, EOS, SYSTEM, USER, ASSISTANT):
                text = text.replace(special, "\n")
            budget -= len(text)
            yield text
        if budget < 0:
            return


def train_tokenizer(seed: int = 1) -> Tokenizer:
    """Byte-level BPE; digits stand alone, which makes arithmetic learnable."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_text(seed), trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    return tokenizer


# --- packing ----------------------------------------------------------------------


def encode_documents(tokenizer: Tokenizer, documents: list[Document]) -> list[int]:
    """One stream: each document opened by the begin and closed by the end token."""
    bos, eos = SPECIAL_TOKENS.index(BOS), SPECIAL_TOKENS.index(EOS)
    stream: list[int] = []
    for encoding in tokenizer.encode_batch([d.text for d in documents], add_special_tokens=False):
        stream += [bos, *encoding.ids, eos]
    return stream


def packed_chat(
    tokenizer: Tokenizer, *, seed: int, length: int, copying: bool
) -> Iterator[tuple[list[int], list[bool]]]:
    """Rows of `length` + 1 tokens with, for each token, whether it is learned.

    Conversations follow one another and are cut at the end of a row; the next
    row opens with a fresh one, so that a row never starts in mid-sentence.
    """
    ids: list[int] = []
    learned: list[bool] = []
    for segments in conversations(seed, copying=copying):
        texts = [segment.text for segment in segments]
        for segment, encoding in zip(
            segments, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True
        ):
            ids += encoding.ids
            learned += [segment.learned] * len(encoding.ids)
        if len(ids) > length:
            yield ids[: length + 1], learned[: length + 1]
            ids, learned = [], []
