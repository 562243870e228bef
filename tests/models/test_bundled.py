"""The bundled models' files, their tokenizer and template, the tasks and their checkers.

What is not here: the quality of the models, which `evaluate` measures and tests elsewhere compare.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from fxlm.models.bundled import BUNDLED
from fxlm.models.bundled.oneline import check_function, is_safe
from fxlm.models.bundled.operations import OPERATIONS
from fxlm.models.bundled.tasks import (
    CHECKERS,
    GENERATORS,
    Task,
    check,
    held_out_tasks,
    is_held_out,
    score_tasks,
    training_tasks,
)

MAIN, DRAFT = BUNDLED["bundled"], BUNDLED["bundled-draft"]
FOLDER = MAIN.parent
MAX_BYTES = 12_000_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def num_parameters(folder: Path) -> int:
    total = 0
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            part = file.get_slice(name)
            assert part.get_dtype() == "BF16", name
            rows, *columns = part.get_shape()
            total += rows * (columns[0] if columns else 1)
    return total


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MAIN / "tokenizer.json"))


@pytest.mark.parametrize("folder", [MAIN, DRAFT], ids=["main", "draft"])
def test_folder_is_a_standard_checkpoint(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == 4096
    assert config["tie_word_embeddings"]
    assert "auto_map" not in config
    assert generation["eos_token_id"] == [config["eos_token_id"]]
    assert 0 < generation["temperature"] <= 1


def test_sizes() -> None:
    main, draft = num_parameters(MAIN), num_parameters(DRAFT)
    assert 3_000_000 <= main <= 6_000_000
    assert draft * 8 <= main
    files = [path for folder in (MAIN, DRAFT) for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_draft_has_the_same_tokenizer(name: str) -> None:
    assert (MAIN / name).read_bytes() == (DRAFT / name).read_bytes()


def test_transformers_loads_it_without_code_of_ours() -> None:
    from transformers import AutoConfig, AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(MAIN)
    config = AutoConfig.from_pretrained(MAIN)
    assert loaded.eos_token_id == config.eos_token_id
    assert loaded.pad_token_id == config.pad_token_id
    assert loaded.bos_token_id == config.bos_token_id == loaded("x")["input_ids"][0]


def test_chat_template_renders() -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(MAIN)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "1+1"},
    ]
    text = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin|><|system|>Be brief.<|end|><|user|>Hi<|end|>"
        "<|assistant|>Hello!<|end|><|user|>1+1<|end|><|assistant|>"
    )
    closed = loaded.apply_chat_template(messages[:2], tokenize=False)
    assert closed == "<|begin|><|system|>Be brief.<|end|><|user|>Hi<|end|>"


def test_training_spells_conversations_as_the_template_does() -> None:
    from transformers import AutoTokenizer

    from fxlm.models.bundled.data import conversations

    loaded = AutoTokenizer.from_pretrained(MAIN)
    stream = conversations(seed=5)
    for _ in range(20):
        spelled = "".join(segment.text for segment in next(stream))
        turns = re.findall(r"<\|(system|user|assistant)\|>(.*?)<\|end\|>", spelled, re.DOTALL)
        messages = [{"role": role, "content": text} for role, text in turns]
        assert loaded.apply_chat_template(messages, tokenize=False) == spelled


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "def f(x):\n    return x + 1\n",
        "naïve café",
        "日本語 Ω 🙂",
        "\x00\t\r\n  é",
        "3.14159",
    ],
)
def test_tokenizer_round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("2048+17", add_special_tokens=False).tokens
    assert tokens == ["2", "0", "4", "8", "+", "1", "7"]


@pytest.mark.parametrize("kind", list(GENERATORS))
def test_checker_accepts_the_answer_and_rejects_others(kind: str) -> None:
    tasks = held_out_tasks(kind, 20)
    assert len(tasks) == 20
    for task, other in zip(tasks, [*tasks[1:], tasks[0]], strict=True):
        assert check(task, task.answer)
        assert not check(task, "")
        assert not check(task, "I do not know.")
        if task.answer != other.answer and kind != "chat":
            assert check(task, other.answer) == (
                kind in ("arithmetic", "count") and _same_number(task, other)
            )


def _same_number(task: Task, other: Task) -> bool:
    return task.answer.split()[-1] == other.answer.split()[-1]


def test_every_kind_has_a_checker() -> None:
    assert list(GENERATORS) == list(CHECKERS)


def test_checkers_are_strict_about_values() -> None:
    [task] = held_out_tasks("json", 1)
    wanted: dict[str, Any] = json.loads(task.answer)
    assert check(task, json.dumps(dict(reversed(wanted.items())), indent=2))
    assert not check(task, json.dumps(wanted | {"extra": 1}))
    assert not check(task, json.dumps({**wanted, next(iter(wanted)): None}))
    assert not check(task, task.answer[:-1])


def test_training_never_sees_held_out_problems() -> None:
    stream = training_tasks(seed=7)
    seen = {next(stream).key for _ in range(3000)}
    assert not any(map(is_held_out, seen))
    for kind in GENERATORS:
        assert not seen & {task.key for task in held_out_tasks(kind, 50)}


def test_held_out_problems_are_fixed() -> None:
    assert held_out_tasks("json", 5) == held_out_tasks("json", 5)
    assert held_out_tasks("json", 5) == held_out_tasks("json", 9)[:5]


def test_scores_take_any_engine() -> None:
    answers = {task.prompt: task.answer for kind in GENERATORS for task in held_out_tasks(kind, 4)}
    scores = score_tasks(lambda chats: [answers[chat[-1]["content"]] for chat in chats], 4)
    assert scores == dict.fromkeys(GENERATORS, 1.0)
    assert not any(score_tasks(lambda chats: ["?"] * len(chats), 4).values())


def test_operations_agree_with_themselves() -> None:
    for operation in OPERATIONS:
        names = operation.params[0].split()
        fields = dict(zip("abc", names, strict=False)) | {"k": "3", "j": "4"}
        line = f"def f({', '.join(names)}): return {operation.expression.format(**fields)}"
        assert check_function(line, line, operation), line
        assert not check_function(line.replace("return ", "return not "), line, operation)


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "def f(x): return x.__class__",
        "def f(x): return open(x)",
        "def f(x): return __import__('os')",
        "def f(x): return 9 ** 9 ** 9",
        "def f(x): return 'a' * 100 * 100 * 100",
        "def f(x): return 1000000 * x",
        "def f(n): return 1 if n < 1 else f(n - 1) + f(n - 1)",
        "def max(n): return 1 if n < 1 else max(n - 1) + max(n - 1)",
        "def f(n): return (lambda g: g(g))(n)",
        "def f(n): return ('%' + '99d') % n",
        "def f(n): return f'{n:99}'",
        "def f(n, x=[y for y in range(9) for z in range(9)]): return x",
        "def f(x):\n    return x",
        "def f(x): return x; import os",
        "@print\ndef f(x): return x",
        "lambda x: x",
        "def f(",
    ],
)
def test_unsafe_lines_are_not_run(line: str) -> None:
    assert not is_safe(line)


def test_readme_states_the_stored_figures() -> None:
    from fxlm.models.bundled.evaluate import CLOSE_MARK, OPEN_MARK, README, RESULTS, table

    between = README.read_text().split(OPEN_MARK)[1].split(CLOSE_MARK)[0]
    assert between.strip() == table(json.loads(RESULTS.read_text()))
