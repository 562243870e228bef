"""The kinds of synthetic chat task: a generator and a checker each.

A generator draws a problem from a `random.Random`; the checker judges any text
given as its answer. Which problems are held out, and scoring, is in `tasks`.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass

from fxlm.models.bundled.oneline import check_function
from fxlm.models.bundled.operations import OPERATIONS, Operation
from fxlm.models.bundled.words import (
    CITIES,
    COLORS,
    FIRST_NAMES,
    FUNCTION_WORDS,
    JOBS,
    PETS,
    SYLLABLES,
    WORDS,
)

PERSONA = (
    "I am the fxlm bundled model, a very small language model that ships with "
    "the fxlm inference engine."
)
ABILITIES = (
    "I can do small arithmetic, reverse or count words, extract fields of a "
    "sentence into JSON, and write one-line Python functions."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One turn: what the user says, the reference answer, and how to judge."""

    kind: str
    key: str
    prompt: str
    answer: str
    operation: Operation | None = None
    constants: tuple[int, ...] = ()


# --- arithmetic ---------------------------------------------------------------

_ADD = (
    "What is {a} + {b}?",
    "{a} + {b} =",
    "Add {a} and {b}.",
    "Calculate {a} + {b}.",
    "What is {a} plus {b}?",
    "How much is {a} + {b}?",
    "{a}+{b}",
    "What is the sum of {a} and {b}?",
)
_SUB = (
    "What is {a} - {b}?",
    "{a} - {b} =",
    "Subtract {b} from {a}.",
    "Calculate {a} - {b}.",
    "What is {a} minus {b}?",
    "How much is {a} - {b}?",
    "{a}-{b}",
)
_MUL = (
    "What is {a} * {b}?",
    "{a} * {b} =",
    "Multiply {a} by {b}.",
    "Calculate {a} * {b}.",
    "What is {a} times {b}?",
    "How much is {a} * {b}?",
    "{a}*{b}",
    "What is {a} x {b}?",
)


def _operand(rng: random.Random) -> int:
    # Even weight on one, two and three digits: uniform would be 90 % three.
    return rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3, 3)))


def _worked(a: int, sign: str, b: int, value: int) -> str:
    """The answer; a sum or difference of longer numbers from its last digit on.

    A carry runs from the right: a model this small learns to write digits in
    that order with far fewer examples, and then turns them round.
    """
    if sign == "*" or max(a, b) < 10:
        return f"{a} {sign} {b} = {value}"
    return f"{a} {sign} {b}: backwards {str(abs(value))[::-1]}, so {value}"


def arithmetic(rng: random.Random) -> Task:
    """Addition and subtraction up to three digits, products up to 20 x 12."""
    sign = rng.choice("+++---*")
    if sign == "*":
        a, b = rng.randrange(21), rng.randrange(13)
        a, b = (b, a) if rng.random() < 0.5 else (a, b)
        value, wordings = a * b, list(_MUL)
    elif sign == "+":
        a, b = _operand(rng), _operand(rng)
        value, wordings = a + b, list(_ADD)
    else:
        a, b = _operand(rng), _operand(rng)
        if a < b and rng.random() < 0.85:
            a, b = b, a
        value, wordings = a - b, list(_SUB)
    low, high = (a, b) if sign == "-" else (min(a, b), max(a, b))
    return Task(
        kind="arithmetic",
        key=f"{low}{sign}{high}",
        prompt=rng.choice(wordings).format(a=a, b=b),
        answer=_worked(a, sign, b, value),
    )


def check_arithmetic(task: Task, output: str) -> bool:
    """The last integer of the output is the value."""
    found = re.findall(r"-?\d+", output)
    return bool(found) and found[-1] == task.answer.rsplit(" ", 1)[-1]


# --- words --------------------------------------------------------------------


def _words(rng: random.Random, low: int, high: int) -> list[str]:
    return [rng.choice(WORDS) for _ in range(rng.randint(low, high))]


_REVERSE = (
    "Reverse the order of these words: {w}",
    "Reverse these words: {w}",
    "Write these words in reverse order: {w}",
    "Say these words backwards: {w}",
    "Reverse: {w}",
)


def reverse(rng: random.Random) -> Task:
    """Three to six words, in reverse order."""
    words = _words(rng, 3, 6)
    separator = ", " if rng.random() < 0.25 else " "
    text = separator.join(words)
    return Task(
        kind="reverse",
        key="reverse " + " ".join(words),
        prompt=rng.choice(_REVERSE).format(w=text),
        answer=separator.join(reversed(words)),
    )


def check_same_words(task: Task, output: str) -> bool:
    """The words of the output are those of the answer, in order."""
    return re.findall(r"\w+", output.lower()) == re.findall(r"\w+", task.answer.lower())


_COUNT = (
    "How many words are in this list: {w}",
    "Count the words: {w}",
    "How many words are there: {w}",
    "Count these words: {w}",
)
_OCCUR = (
    'How many times does "{x}" appear in: {w}',
    'Count "{x}" in: {w}',
    'How often is "{x}" in this list: {w}',
)


def count(rng: random.Random) -> Task:
    """Number of words (one to ten), or of one word among two to eight."""
    if rng.random() < 0.6:
        words = _words(rng, 1, 10)
        prompt = rng.choice(_COUNT).format(w=" ".join(words))
        return Task(
            kind="count", key="count " + " ".join(words), prompt=prompt, answer=str(len(words))
        )
    wanted = rng.choice(WORDS)
    words = [wanted if rng.random() < 0.4 else rng.choice(WORDS) for _ in range(rng.randint(2, 8))]
    prompt = rng.choice(_OCCUR).format(x=wanted, w=" ".join(words))
    return Task(
        kind="count",
        key=f"occur {wanted} in " + " ".join(words),
        prompt=prompt,
        answer=str(words.count(wanted)),
    )


def check_number(task: Task, output: str) -> bool:
    """The first integer of the output is the answer."""
    found = re.search(r"\d+", output)
    return found is not None and found.group() == task.answer


_REPEAT = ("Repeat after me: {w}", "Repeat: {w}", "Say this: {w}", "Copy these words: {w}")


def repeat(rng: random.Random) -> Task:
    """Two to eight words, said again."""
    text = " ".join(_words(rng, 2, 8))
    return Task(
        kind="repeat", key="repeat " + text, prompt=rng.choice(_REPEAT).format(w=text), answer=text
    )


# --- JSON ---------------------------------------------------------------------


def _invented(rng: random.Random) -> str:
    """A name nobody has: forces copying, where a list could be memorized."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize()


def _name(rng: random.Random) -> str:
    return rng.choice(FIRST_NAMES) if rng.random() < 0.6 else _invented(rng)


def _city(rng: random.Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.6 else _invented(rng)


_CLAUSES: dict[str, tuple[str, ...]] = {
    "age": ("is {v} years old", "is {v}", "is aged {v}"),
    "city": ("lives in {v}", "comes from {v}", "moved to {v}", "was born in {v}"),
    "job": ("works as a {v}", "is a {v}", "earns a living as a {v}"),
    "color": ("likes the color {v}", "loves {v}", "always wears {v}"),
    "pet": ("has a {v}", "owns a {v}", "keeps a {v}"),
}
_EXTRACT = (
    "Extract {f} as JSON: {s}",
    "Extract {f} from this sentence as JSON: {s}",
    "Give me {f} as JSON. {s}",
    "Return JSON with {f}: {s}",
    "{s}\nExtract {f} as JSON.",
)


def _facts(rng: random.Random) -> dict[str, str | int]:
    return {
        "name": _name(rng),
        "age": rng.randint(1, 99),
        "city": _city(rng),
        "job": rng.choice(JOBS),
        "color": rng.choice(COLORS),
        "pet": rng.choice(PETS),
    }


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def extract(rng: random.Random) -> Task:
    """A sentence of two to four facts; two or more of them asked for."""
    facts = _facts(rng)
    told = rng.sample(sorted(_CLAUSES), rng.randint(1, 3))
    clauses = [rng.choice(_CLAUSES[field]).format(v=facts[field]) for field in told]
    sentence = f"{facts['name']} {_joined(clauses)}."
    asked = rng.sample(["name", *told], rng.randint(2, 1 + len(told)))
    answer = json.dumps({field: facts[field] for field in asked})
    prompt = rng.choice(_EXTRACT).format(f=_joined(asked), s=sentence)
    return Task(kind="json", key=f"json {','.join(asked)} {sentence}", prompt=prompt, answer=answer)


def check_json(task: Task, output: str) -> bool:
    """The output parses to the same object: keys, values and types."""
    try:
        found = json.loads(output)
    except ValueError:
        return False
    wanted = json.loads(task.answer)
    return isinstance(found, dict) and json.dumps(found, sort_keys=True) == json.dumps(
        wanted, sort_keys=True
    )


# --- one-line functions ---------------------------------------------------------

_DEFINE = (
    "Write a one-line Python function {n}({p}) that {d}.",
    "Write a Python function {n}({p}) that {d}.",
    "Write a function called {n} with arguments {p} that {d}.",
    "Define {n}({p}), which {d}.",
)


def function(rng: random.Random) -> Task:
    """A one-line function from its description, names and constants varied."""
    operation = rng.choice(OPERATIONS)
    names = rng.choice(operation.params)
    constants = tuple(rng.randint(low, high) for low, high in operation.constants)
    fields = dict(zip("abc", names.split(), strict=False)) | dict(
        zip("kj", map(str, constants), strict=False)
    )
    name = rng.choice(operation.names)
    if rng.random() < 0.4:
        name = "_".join(rng.sample(FUNCTION_WORDS, rng.randint(1, 2)))
    params = ", ".join(names.split())
    description = rng.choice(operation.descriptions).format(**fields)
    return Task(
        kind="function",
        key=f"def {name}({params}) {operation.expression.format(**fields)}",
        prompt=rng.choice(_DEFINE).format(n=name, p=params, d=description),
        answer=f"def {name}({params}): return {operation.expression.format(**fields)}",
        operation=operation,
        constants=constants,
    )


def check_function_task(task: Task, output: str) -> bool:
    """The output is one safe line and agrees with the reference on inputs."""
    assert task.operation is not None, task.key
    return check_function(output, task.answer, task.operation)


# --- conversation ---------------------------------------------------------------

_HELLO = (
    "Hello",
    "Hi",
    "Hey",
    "Hello!",
    "Hi!",
    "Hi there",
    "Hello there",
    "Good morning",
    "Good evening",
    "hello",
    "hi",
    "Hey there!",
    "Good day",
    "Hello, how are you?",
    "How are you?",
    "Hi, how are you?",
)
_WHO = (
    "What are you?",
    "Who are you?",
    "What is your name?",
    "Tell me about yourself.",
    "Introduce yourself.",
    "What model are you?",
    "Which model is this?",
    "Are you a human?",
    "What's your name?",
    "who are you",
    "what are you",
    "Are you an AI?",
    "Are you ChatGPT?",
    "Who made you?",
    "Hello, who are you?",
)
_CAN = (
    "What can you do?",
    "Help",
    "help",
    "How can you help me?",
    "What do you know?",
    "What are you good at?",
    "What can I ask you?",
    "What should I ask you?",
    "Can you help me?",
)
_THANKS = (
    "Thanks",
    "Thank you",
    "Thanks!",
    "Thank you!",
    "Thank you very much.",
    "Great, thanks.",
    "thanks",
)
_BYE = ("Bye", "Goodbye", "Bye!", "Goodbye!", "See you", "See you later", "Good night", "bye")
_BEYOND = (
    "What is the capital of {c}?",
    "Who is {n}?",
    "Tell me a story about a {w}.",
    "Tell me a joke.",
    "What is the weather in {c}?",
    "Write a poem about {w}.",
    "Explain {w} to me.",
    "Why is the {w} {x}?",
    "What is the meaning of life?",
    "Translate {w} into French.",
    "Who wrote {w} and {x}?",
    "Where is {c}?",
    "What is a {w}?",
    "When was {n} born?",
    "How do I get to {c}?",
    "Do you like {w}?",
    "What do you think about {w}?",
    "Can you recommend a book about {w}?",
    "Write an essay about {w}.",
)


_BEFORE = ("", "", "Hello, ", "Hi, ", "Please tell me: ", "Hey! ", "Well, ", "So, ")
_AFTER = ("", "", "", " please", " now", "!", "...")


def _varied(phrase: str, rng: random.Random) -> str:
    """The phrase in other clothes, so that some can be held out."""
    phrase = phrase.rstrip("?!.") if rng.random() < 0.4 else phrase
    phrase = phrase.lower() if rng.random() < 0.4 else phrase
    return rng.choice(_BEFORE) + phrase + rng.choice(_AFTER)


def chat(rng: random.Random) -> Task:
    """Greetings, questions about the model, and what is beyond it.

    The plain phrases share one key, which is not held out: the model must
    know them. Their variations and the questions beyond it have keys.
    """
    topics: tuple[tuple[tuple[str, ...], str], ...] = (
        (_HELLO, "Hello! I am the fxlm bundled model. How can I help you?"),
        (_WHO, f"{PERSONA} {ABILITIES}"),
        (_CAN, ABILITIES),
        (_THANKS, "You are welcome!"),
        (_BYE, "Goodbye!"),
    )
    if rng.random() < 0.3:
        answer = f"I am too small a model to know that. {ABILITIES}"
        slots = {"c": _city(rng), "n": _name(rng), "w": rng.choice(WORDS), "x": rng.choice(WORDS)}
        prompt = rng.choice(_BEYOND).format(**slots)
        return Task(kind="chat", key="chat " + prompt, prompt=prompt, answer=answer)
    prompts, answer = rng.choice(topics)
    prompt = rng.choice(prompts)
    if rng.random() < 0.5:
        return Task(kind="chat", key="chat", prompt=prompt, answer=answer)
    prompt = _varied(prompt, rng)
    plain = any(prompt in phrases for phrases, _ in topics)
    return Task(
        kind="chat", key="chat" if plain else "chat " + prompt, prompt=prompt, answer=answer
    )


def check_exact(task: Task, output: str) -> bool:
    """The output is the reference answer."""
    return output.strip() == task.answer
