"""The rules of the house, read from the source by ``ast``: one test a rule, offenders listed.

What is not here: style that ruff sees, types that mypy sees, and the package list
(``test_packaging.py``). An exception to a rule stands in this file, with its reason beside it.
"""

import ast
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

# Imports go down only; rooms on one floor do not know each other.
FLOORS = {"server": 3, "runtime": 2, "models": 1, "passes": 1, "compiler": 0}
UMBRELLA = {"__init__.py", "__main__.py", "py.typed"}

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_CPP_LINES = 800
CPP_SUFFIXES = {".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp"}

# What a room must not know, by the name under which Python imports it.
FOREIGN = {
    "server": ("torch", "transformers"),
    "runtime": ("torch.fx", "torch.export", "torch._inductor", "torch._dynamo", "transformers"),
    "passes": ("transformers",),
}
FOREIGN_ALLOWED = {"runtime/check.py": "compares with transformers, so it runs transformers"}
PICKLERS = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
PICKLING_CALLS = ("torch.load", "torch.save")
EVALUATING_CALLS = ("eval", "exec", "builtins.eval", "builtins.exec")

# Files that may read the environment of the process, each with what it looks for.
ENVIRONMENT_READERS = {
    "compiler/cache.py": "where caches are (XDG_CACHE_HOME)",
    "compiler/ops/build.py": "the C++ compiler, the ISA under test",
    "runtime/parallel/choice.py": "RANK and the like, by which torchrun tells a process its place",
    "runtime/spins.py": "how long threads spin, which OpenMP takes from there when torch is loaded",
    "server/options.py": "the API key, which must not stand in a process list",
}
# Files that may call eval or exec, each with what is evaluated.
EVALUATORS = {
    "models/bundled/oneline.py": "one-line functions of a task whose syntax is on an allow-list",
}
# Modules outside server/cli that are run by hand and print what they did.
LAUNCHED = {
    "compiler/ops/build.py",
    "fxlm/__main__.py",
    "models/bundled/evaluate.py",
    "models/bundled/train.py",
    "runtime/explain/commands.py",
    "runtime/client.py",  # hands on what the starting engine says
    "runtime/launch.py",
    "runtime/service.py",
}
# Folders of tests/ that mirror no room.
OTHER_TEST_FOLDERS = {"bench", "docs", "e2e"}


@dataclass(frozen=True, kw_only=True)
class Module:
    """One Python file: its path from the root of the checkout, its text and its tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.path.split("/", 1)[0]

    @functools.cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        """Every node of the tree, which most rules look at."""
        return tuple(ast.walk(self.tree))

    def calls(self) -> Iterator[tuple[ast.Call, str]]:
        """Every call whose callee is a dotted name, with that name."""
        for node in self.nodes:
            if isinstance(node, ast.Call) and (name := dotted(node.func)):
                yield node, name

    def imports(self) -> Iterator[tuple[int, str]]:
        """Line and full name of every absolute import, inside functions and by string too."""
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        for call, name in self.calls():
            first = call.args[0] if call.args else None
            if name in ("importlib.import_module", "import_module", "__import__") and isinstance(
                first, ast.Constant
            ):
                yield call.lineno, str(first.value)


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a chain of attributes on a name, else the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


@functools.cache
def modules(folder: str) -> tuple[Module, ...]:
    """Every Python file under the folder, parsed."""
    return tuple(
        Module(path=path.relative_to(REPO).as_posix(), text=text, tree=ast.parse(text))
        for path in sorted((REPO / folder).rglob("*.py"))
        for text in [path.read_text(encoding="utf-8")]
    )


def under(*folders: str) -> tuple[Module, ...]:
    return tuple(module for folder in folders for module in modules(folder))


def rooms() -> tuple[Module, ...]:
    return under(*FLOORS)


def shipped() -> tuple[Module, ...]:
    return under(*FLOORS, "fxlm")


def everything() -> tuple[Module, ...]:
    return under(*FLOORS, "fxlm", "tests", "bench")


def covers(package: str, name: str) -> bool:
    """Whether ``name`` is the package or lies inside it."""
    return name == package or name.startswith(package + ".")


# --- the rules: each yields "path:line: what is wrong" -------------------------------------------


def imports_go_down() -> Iterator[str]:
    """server > runtime > models, passes (which never import each other) > compiler."""
    for module in rooms():
        for line, name in module.imports():
            parts = name.split(".")
            target = parts[1] if parts[0] == "fxlm" and len(parts) > 1 else ""
            if target not in FLOORS or target == module.room:
                continue
            if FLOORS[target] >= FLOORS[module.room]:
                yield f"{module.path}:{line}: {module.room} imports {name}"


def umbrella_is_not_imported_from_below() -> Iterator[str]:
    """A room takes nothing from ``fxlm/__init__.py`` but the version."""
    for module in rooms():
        for line, name in module.imports():
            top, *rest = name.split(".")
            if top == "fxlm" and rest and rest[0] not in (*FLOORS, "__version__"):
                yield f"{module.path}:{line}: imports {name}; name the room it lives in"
        for node in module.nodes:
            name = dotted(node) if isinstance(node, ast.Attribute) else ""
            top, *rest = name.split(".")
            if top == "fxlm" and rest[0] not in (*FLOORS, "__version__"):
                yield f"{module.path}:{node.lineno}: uses {name}"


def umbrella_holds_three_files() -> Iterator[str]:
    """fxlm/ holds __init__.py, __main__.py and py.typed, and nothing else."""
    for path in sorted((REPO / "fxlm").iterdir()):
        if path.name not in UMBRELLA | {"__pycache__"}:
            yield f"fxlm/{path.name}: belongs to a room"


def imports_are_absolute() -> Iterator[str]:
    """``from fxlm.compiler.program import Program``, from anywhere."""
    for module in everything():
        for node in module.nodes:
            if isinstance(node, ast.ImportFrom) and node.level:
                yield f"{module.path}:{node.lineno}: relative import"
        for line, name in module.imports():
            if any(covers(room, name) for room in FLOORS):
                yield f"{module.path}:{line}: {name} is imported as fxlm.{name}"


def rooms_know_their_subject_alone() -> Iterator[str]:
    """The server knows no tensors, the run path no FX, the passes no model class."""
    for module in rooms():
        for line, name in module.imports():
            for package in FOREIGN.get(module.room, ()):
                if covers(package, name) and module.path not in FOREIGN_ALLOWED:
                    yield f"{module.path}:{line}: {module.room} imports {name}"


def files_are_short() -> Iterator[str]:
    """500 lines of Python, 800 of C++."""
    for module in everything():
        if (lines := module.text.count("\n")) > MAX_FILE_LINES:
            yield f"{module.path}: {lines} lines, at most {MAX_FILE_LINES}"
    for room in FLOORS:
        for path in sorted((REPO / room).rglob("*")):
            if path.suffix in CPP_SUFFIXES:
                lines = path.read_text(encoding="utf-8").count("\n")
                if lines > MAX_CPP_LINES:
                    yield f"{path.relative_to(REPO)}: {lines} lines, at most {MAX_CPP_LINES}"


def functions_are_short() -> Iterator[str]:
    """80 lines with signature and docstring; aim at 15."""
    for module in everything():
        for node in module.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    where = f"{module.path}:{node.lineno}"
                    yield f"{where}: {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}"


def modules_have_docstrings() -> Iterator[str]:
    """A module says what is here and what is not."""
    for module in everything():
        if not ast.get_docstring(module.tree):
            yield f"{module.path}:1: no docstring"


def nothing_is_pickled() -> Iterator[str]:
    """No pickle on any wire or disk, under any of its names."""
    for module in shipped():
        for line, name in module.imports():
            if any(covers(pickler, name) for pickler in PICKLERS) or name in PICKLING_CALLS:
                yield f"{module.path}:{line}: imports {name}"
        for call, name in module.calls():
            allows = any(keyword.arg == "allow_pickle" for keyword in call.keywords)
            if name in PICKLING_CALLS or allows:
                yield f"{module.path}:{call.lineno}: {name} pickles"


def nothing_is_evaluated() -> Iterator[str]:
    """No eval and no exec on data."""
    for module in shipped():
        for call, name in module.calls():
            if name in EVALUATING_CALLS and module.path not in EVALUATORS:
                yield f"{module.path}:{call.lineno}: {name}"


def excepts_name_what_they_catch() -> Iterator[str]:
    """No bare except."""
    for module in everything():
        for node in module.nodes:
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                yield f"{module.path}:{node.lineno}: bare except"


def environment_is_an_option() -> Iterator[str]:
    """Options are typed arguments; the environment is read in the files that are listed here."""
    names = ("os.environ", "os.environb", "os.getenv", "os.getenvb")
    for module in shipped():
        if module.path in ENVIRONMENT_READERS:
            continue
        for node in module.nodes:
            if isinstance(node, ast.Attribute) and dotted(node) in names:
                yield f"{module.path}:{node.lineno}: {dotted(node)}"
        for line, name in module.imports():
            if name in names:
                yield f"{module.path}:{line}: imports {name}"


def libraries_do_not_print() -> Iterator[str]:
    """The command line prints, and what is launched by hand; the rest returns, raises or logs."""
    for module in shipped():
        if module.path in LAUNCHED or module.path.startswith("server/cli"):
            continue
        for call, name in module.calls():
            if name == "print":
                yield f"{module.path}:{call.lineno}: print"


def mirrored_by_tests() -> Iterator[str]:
    """tests/<room>/ follows the folders of the room."""
    for path in sorted((REPO / "tests").rglob("*")):
        relative = path.relative_to(REPO / "tests")
        if not path.is_dir() or "__pycache__" in relative.parts:
            continue
        if relative.parts[0] in OTHER_TEST_FOLDERS or relative.parts[-1] == "data":
            continue
        if relative.parts[0] not in FLOORS or not (REPO / relative).is_dir():
            yield f"tests/{relative}: mirrors no folder of a room"


def passes_are_tested() -> Iterator[str]:
    """passes/<name>.py, one idea a file, has tests/passes/test_<name>.py."""
    for module in modules("passes"):
        path = Path(module.path)
        wanted = REPO / "tests" / path.parent / f"test_{path.name}"
        if not path.name.startswith("_") and not wanted.exists():
            yield f"{module.path}: no {wanted.relative_to(REPO)}"


RULES: tuple[Callable[[], Iterator[str]], ...] = (
    imports_go_down,
    umbrella_is_not_imported_from_below,
    umbrella_holds_three_files,
    imports_are_absolute,
    rooms_know_their_subject_alone,
    files_are_short,
    functions_are_short,
    modules_have_docstrings,
    nothing_is_pickled,
    nothing_is_evaluated,
    excepts_name_what_they_catch,
    environment_is_an_option,
    libraries_do_not_print,
    mirrored_by_tests,
    passes_are_tested,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Callable[[], Iterator[str]]) -> None:
    offenders = list(rule())
    assert not offenders, "\n  ".join([rule.__doc__ or rule.__name__, *offenders])


# Rule -> a file that breaks it, and its text. Each rule is shown to see what it forbids.
OFFENCES: dict[Callable[[], Iterator[str]], tuple[str, str]] = {
    imports_go_down: ("compiler/a.py", "def f():\n    from fxlm.runtime.engine import Engine\n"),
    umbrella_is_not_imported_from_below: ("server/a.py", "from fxlm import LLM\n"),
    umbrella_holds_three_files: ("fxlm/helpers.py", ""),
    imports_are_absolute: ("models/a.py", "from . import build\n"),
    rooms_know_their_subject_alone: ("runtime/a.py", "from torch import fx\n"),
    files_are_short: ("passes/a.py", "\n" * (MAX_FILE_LINES + 1)),
    functions_are_short: ("bench/a.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
    modules_have_docstrings: ("tests/a.py", "x = 1\n"),
    nothing_is_pickled: ("models/a.py", "import torch\nx = torch.load('w.bin')\n"),
    nothing_is_evaluated: ("server/a.py", "x = eval(input())\n"),
    excepts_name_what_they_catch: ("server/a.py", "try:\n    x = 1\nexcept:\n    pass\n"),
    environment_is_an_option: ("passes/a.py", "from os import getenv\n"),
    libraries_do_not_print: ("compiler/a.py", "print(1)\n"),
    mirrored_by_tests: ("tests/kernels/a.py", ""),
    passes_are_tested: ("passes/fuse_all.py", ""),
}
LAWFUL = {
    "server/a.py": "from fxlm import __version__\nfrom fxlm.runtime.engine import Engine\n",
    "runtime/a.py": "import torch\nfrom fxlm.models.build import build\nmodel.eval()\n",
    "compiler/a.py": "import torch.fx\nfrom fxlm.compiler.errors import FxlmError\n",
    "tests/passes/test_fuse.py": "",
    "passes/fuse.py": "",
}


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small lawful checkout that the rules read instead of this one."""
    for folder in (*FLOORS, "fxlm", "bench"):
        (tmp_path / folder).mkdir()
    for path, text in LAWFUL.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f'"""What is here."""\n{text}')
    monkeypatch.setitem(globals(), "REPO", tmp_path)
    modules.cache_clear()
    yield tmp_path
    modules.cache_clear()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_sees_its_offence(rule: Callable[[], Iterator[str]], house: Path) -> None:
    assert list(rule()) == []
    path, text = OFFENCES[rule]
    (house / path).parent.mkdir(exist_ok=True)
    (house / path).write_text(text)
    modules.cache_clear()
    offenders = list(rule())
    assert len(offenders) == 1
    assert offenders[0].startswith(path.removesuffix("/a.py")), offenders


def test_every_room_is_read() -> None:
    assert {module.room for module in shipped()} == {*FLOORS, "fxlm"}


def test_exceptions_name_files_that_exist() -> None:
    listed = {*ENVIRONMENT_READERS, *EVALUATORS, *FOREIGN_ALLOWED, *LAUNCHED}
    assert sorted(path for path in listed if not (REPO / path).is_file()) == []
