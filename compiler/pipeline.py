"""The pass pipeline: order, run, check, log.

A pass is a function ``(program, **options) -> int``, the number of places it rewrote. The
runner lints, drops dead code, checks the contract, counts and times; the pass does none of
that. A pass that says how often it must fire and does not is an error, never a slow model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from fxlm.compiler import contract, identity
from fxlm.compiler.errors import ContractError, FxlmError, InvalidOption, PassError
from fxlm.compiler.nearest import hint
from fxlm.compiler.program import Program, Stage
from fxlm.compiler.report import PassReport, op_counts, op_diff

PassFunction = Callable[..., int]


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphPass:
    """A pass and its place in the column.

    Attributes:
        name: as users write it.
        run: the function.
        after, before: passes it must follow or precede, where those are present.
        requires: passes that must be present, and earlier.
        expects: how often it must fire: a number, or a function of the program before it.
        stage: stage of the program once it has run; ``None`` leaves it.
        last: a pass of a user that names no place goes before it.
        options: keyword arguments for ``run``.
        origin: installed package that it comes with: name, version and digest.
    """

    name: str
    run: PassFunction
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    expects: int | Callable[[Program], int] | None = None
    stage: Stage | None = None
    last: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    origin: str = ""

    def source_digest(self) -> str:
        """SHA-256 over the modules that the pass is written in (its helpers count too)."""
        return identity.source_digest(self.run)

    def identity(self) -> dict[str, Any]:
        """What a cache key needs of the pass.

        Raises:
            PassError: it stands on a value that a key cannot hold.
        """
        try:
            options = {k: identity.text_of(v, k) for k, v in sorted(self.options.items())}
            values = {} if self.is_ours else identity.values_of(self.run)
        except PassError as error:
            raise PassError(f"pass {self.name}: {error}") from None
        found = {"name": self.name, "source": self.source_digest(), "options": options}
        return found | {k: v for k, v in (("values", values), ("origin", self.origin)) if v}

    @property
    def is_ours(self) -> bool:
        """Whether it comes with this package."""
        return self.run.__module__.startswith("fxlm.passes.")


@overload
def graph_pass(function: PassFunction, /) -> GraphPass: ...
@overload
def graph_pass(
    *,
    name: str | None = None,
    after: str | Sequence[str] = (),
    before: str | Sequence[str] = (),
    requires: str | Sequence[str] = (),
    expects: int | Callable[[Program], int] | None = None,
    stage: Stage | None = None,
    last: bool = False,
) -> Callable[[PassFunction], GraphPass]: ...


def graph_pass(
    function: PassFunction | None = None,
    /,
    *,
    name: str | None = None,
    after: str | Sequence[str] = (),
    before: str | Sequence[str] = (),
    requires: str | Sequence[str] = (),
    expects: int | Callable[[Program], int] | None = None,
    stage: Stage | None = None,
    last: bool = False,
) -> GraphPass | Callable[[PassFunction], GraphPass]:
    """Make a function a pass.

    Args:
        name: defaults to the function's name.
        after, before: names of passes it must follow or precede, where those are present.
        requires: names of passes that must be present and earlier.
        expects: how often it must fire (a number or a function of the program before it); a
            different count raises `PassError`.
        stage: stage of the program once the pass has run.
        last: a user's pass that names no place goes before it: for passes that replace ops which
            others look for.
    """

    def wrap(run: PassFunction) -> GraphPass:
        return GraphPass(
            name=name or run.__name__,
            run=run,
            after=_names(after),
            before=_names(before),
            requires=_names(requires),
            expects=expects,
            stage=stage,
            last=last,
        )

    return wrap if function is None else wrap(function)


def order(column: Iterable[GraphPass], extra: Iterable[GraphPass] = ()) -> list[GraphPass]:
    """Merge user passes into the default column.

    The column keeps its order; an extra pass goes behind the last pass it must follow, or, if
    it names none, before the first it must precede, or to the end (before passes that are
    ``last``). Extra passes may name each other, in whatever order they are given.

    Raises:
        InvalidOption: an unknown name, a name used twice, or an order that cannot be met.
    """
    passes, added = list(column), list(extra)
    known = [p.name for p in (*passes, *added)]
    for new in added:
        if known.count(new.name) > 1:
            raise InvalidOption("pass", new.name, "a pass of this name is already in the column")
        for other in (*new.after, *new.before, *new.requires):
            if other == new.name:
                raise InvalidOption(
                    "pass", new.name, "it cannot be before, after or without itself"
                )
            if other not in known:
                raise InvalidOption("pass", f"{new.name} -> {other}", _suggest(other, known))
    for new in _by_names(added):
        passes.insert(_position(new, passes), new)
    _check_order(passes)
    return passes


def disable(passes: Sequence[GraphPass], names: Iterable[str]) -> list[GraphPass]:
    """The column without the named passes; an unknown or a needed one is an error."""
    known = [p.name for p in passes]
    for name in names:
        if name not in known:
            raise InvalidOption("--disable-pass", name, _suggest(name, known))
    kept = [p for p in passes if p.name not in set(names)]
    _check_order(kept)
    return kept


def require_names(names: Iterable[str], known: Sequence[str]) -> None:
    """Refuse a name that no pass has, with the nearest that one has."""
    for name in names:
        if name not in known:
            raise InvalidOption("--pass", name, _suggest(name, known))


def run(program: Program, passes: Iterable[GraphPass]) -> Program:
    """Run the passes in order on ``program``, in place.

    Raises:
        PassError: a pass failed, fired another number of times than it must, or left an
            unlawful graph; the message names the pass.
        FxlmError: what a pass raises of its own, e.g. InvalidOption.
    """
    program.eliminate_dead_code()  # after each pass `_settle` does
    state: tuple[Any, ...] | None = None  # as the pass before left it, if that is known
    for item in passes:
        earlier = None if item.is_ours else state or _state(program)
        report = _run_one(program, item)
        state = None if earlier is None else _state(program)
        if earlier is not None:
            _check_count(item, report.rewrites, changed=state != earlier)
        program.log.append(report)
    return program


def _run_one(program: Program, item: GraphPass) -> PassReport:
    before = op_counts(program.graph)
    expected = item.expects(program) if callable(item.expects) else item.expects
    program.misses.clear()
    program.notes.clear()
    started = time.perf_counter()
    try:
        rewrites = item.run(program, **item.options)
    except (Exception, SystemExit) as error:
        if isinstance(error, FxlmError):
            raise
        reason = f"{type(error).__name__}: {error} ({_where(error)})"
        raise PassError(f"pass {item.name} failed: {reason}") from error
    seconds = time.perf_counter() - started
    if not isinstance(rewrites, int) or isinstance(rewrites, bool) or rewrites < 0:
        raise PassError(
            f"pass {item.name} returned {rewrites!r}; it must return how many places it rewrote"
        )
    if expected is not None and rewrites != expected:
        nearest = f"; nearest miss: {program.misses[-1]}" if program.misses else ""
        raise PassError(
            f"pass {item.name} rewrote {rewrites} places, but {expected} were expected{nearest}"
        )
    if item.stage is not None:
        program.stage = item.stage
    _settle(program, item)
    after = op_counts(program.graph)
    added, removed = op_diff(before, after)
    return PassReport(
        name=item.name, rewrites=rewrites, seconds=seconds, added=added, removed=removed,
        nodes_before=before.total(), nodes_after=after.total(),
        source_digest=item.source_digest(), stage=program.stage, notes=tuple(program.notes),
    )  # fmt: skip


def _settle(program: Program, item: GraphPass) -> None:
    """Lint, drop dead nodes, check the law; of a pass that is not ours, the shapes too."""
    program.eliminate_dead_code()
    try:
        program.graph.lint()
        contract.check(program)
        if not item.is_ours:
            program.propagate()
    except (ContractError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]  # lint appends the whole graph
        raise PassError(f"pass {item.name} left an unlawful graph: {reason}") from error


def _state(program: Program) -> tuple[Any, ...]:
    """What a pass may change, so that two of them are equal if it changed nothing."""
    calls = [f"{n.op} {n.name} {n.target} {n.args} {n.kwargs}" for n in program.graph.nodes]
    books = program.inputs, program.caches, program.facts, program.taps, program.steered
    constants = {name: (id(value), value._version) for name, value in program.constants.items()}
    return calls, repr(books), constants, program.stage, program.max_tokens


def _check_count(item: GraphPass, rewrites: int, *, changed: bool) -> None:
    """Refuse a count that the program belies."""
    if rewrites and not changed:
        raise PassError(
            f"pass {item.name} returned {rewrites}, but the program is as it was before: calls that"
            " nothing uses are dropped (program.replace(old, new) gives them users); a pass that"
            " only looks returns 0"
        )
    if changed and not rewrites:
        raise PassError(
            f"pass {item.name} returned 0, but changed the program; it must return how many places"
            " it rewrote"
        )


def _where(error: BaseException) -> str:
    """File and line that raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "nowhere"


def _by_names(added: Sequence[GraphPass]) -> list[GraphPass]:
    """Passes in the order given, but each after those of them that it names, where that can be."""
    left, placed = list(added), list[GraphPass]()
    while left:
        names = {p.name for p in left}
        free = (p for p in left if not names & {*p.after, *p.before, *p.requires})
        placed.append(next(free, left[0]))
        left.remove(placed[-1])
    return placed


def _position(new: GraphPass, passes: Sequence[GraphPass]) -> int:
    known = [p.name for p in passes]
    behind = [known.index(n) + 1 for n in (*new.after, *new.requires) if n in known]
    if behind:
        return max(behind)
    ahead = [known.index(n) for n in new.before if n in known]
    return min(ahead) if ahead else len(known) - sum(p.last for p in passes)


def _check_order(passes: Sequence[GraphPass]) -> None:
    known = {item.name: item for item in passes}
    names = list(known)
    for here, item in enumerate(passes):
        for name in item.requires:
            if name not in known:
                remedy = f"{item.name!r} requires the pass {name!r}, which is not in the column: "
                remedy += f"keep {name!r}, or leave {item.name!r} out too"
                raise InvalidOption("pass", item.name, remedy)
        late = [n for n in (*item.after, *item.requires) if n in names[here + 1 :]]
        early = [n for n in item.before if n in names[:here]]
        for word, name in [*(("after", n) for n in late), *(("before", n) for n in early)]:
            place = f"(place {names.index(name) + 1} of {len(names)})"
            raise InvalidOption(
                "pass", item.name,
                f"it must run {word} {name!r} {place}, but is at place {here + 1}; "
                f"{_declared(item, names)}, {_declared(known[name], names)}: change what one of "
                "these declares",
            )  # fmt: skip


def _declared(item: GraphPass, names: Sequence[str]) -> str:
    """The order that a pass asks for, with the places of those that it names."""
    sides = {"after": (*item.after, *item.requires), "before": item.before}
    found = [f"{word} {name!r} (place {names.index(name) + 1})"
             for word, others in sides.items() for name in others if name in names]  # fmt: skip
    return f"{item.name!r} declares {', '.join(found) or 'no order'}"


def _names(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _suggest(name: str, known: Sequence[str]) -> str:
    near = hint(name, known)
    return f"there is no pass {name!r}{near and f'; {near}'} (passes: {', '.join(known)})"
