"""The calls of a stage, and the order in which to answer them: pure functions of rows and answers.

A stage is one step of every row's composition. Its calls are grouped by residency (adapters by their base, then by
adapter), so that each expert is loaded once a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from coe.batch.records import RoutedRow
from coe.compose import Composition, ExpertCall, FallbackOnly, Final, Single, WithFallback, next_step, without
from coe.compose.one_answer import as_one_answer, as_one_echo
from coe.compose.with_peers import with_peers
from coe.errors import CoeError
from coe.types import Answer, Failure
from registry.spec import ExpertSpec

Step = tuple[ExpertCall, ...] | Answer | CoeError


@dataclass(frozen=True, slots=True)
class Unit:
    """The calls of one part to one expert. Their answers are one file.

    Attributes:
        number: position among the part's units; also of its row group in the part's file of calls.
        residency: what must be resident to call the expert; see `ExpertSpec.residency`.
    """

    part: int
    number: int
    expert: str
    residency: str
    calls: int


WorkItem = tuple[Unit, ...]
"""Units of one residency, which one host answers in one go."""


def compositions(
    kinds: Mapping[str, Callable[[], Composition]], experts: Mapping[str, ExpertSpec]
) -> Callable[[RoutedRow], Composition]:
    """A function from a row to its composition: that of its policy, with the fallback, without the excluded experts.

    Args:
        kinds: policy -> what builds its composition.
        experts: by name; the peers of composed ones are called before them.
    """
    built = {policy: build() for policy, build in kinds.items()}

    def of(row: RoutedRow) -> Composition:
        if row.decision is not None and row.decision.fallback:
            return with_peers(FallbackOnly(), experts)
        needs = row.request.needs if row.request else frozenset()
        composition = (
            Single() if row.policy is None else without(as_one_answer(built[row.policy], needs), row.barred or {})
        )
        if row.request is not None and row.request.echo:
            composition = as_one_echo(composition)
        whole = composition if row.fallback is None else WithFallback(composition, row.fallback)
        return with_peers(whole, experts)

    return of


def step(row: RoutedRow, composition: Composition, done: Mapping[str, Answer | Failure]) -> Step:
    """The next calls of a row, or its answer, or its error."""
    assert row.request is not None and row.decision is not None  # other rows have errors, and are never stepped
    try:
        following = next_step(composition, row.request, row.decision, done)
    except CoeError as error:
        return error
    return following.answer if isinstance(following, Final) else following.calls


def plan_units(
    part: int, calls: Iterable[tuple[int, ExpertCall]], residency_of: Callable[[str], str]
) -> list[tuple[Unit, list[tuple[int, ExpertCall]]]]:
    """The calls of a part by unit: bases in order of their names, each followed by its adapters."""
    by_expert: dict[str, list[tuple[int, ExpertCall]]] = {}
    for row, call in calls:
        by_expert.setdefault(call.expert, []).append((row, call))
    ordered = sorted(by_expert, key=lambda expert: (residency_of(expert), expert != residency_of(expert), expert))
    return [
        (Unit(part, number, expert, residency_of(expert), len(by_expert[expert])), by_expert[expert])
        for number, expert in enumerate(ordered)
    ]


def plan_work_items(units: Sequence[Unit], hosts: int) -> list[WorkItem]:
    """The work items of a stage, the largest first.

    With one host every residency is one item, so each is loaded once. With several hosts, a residency with more than
    one host's share of the calls is split, and loaded by each host that answers a piece.
    """
    share = -(-sum(unit.calls for unit in units) // hosts)
    items: list[WorkItem] = []
    for residency in sorted({unit.residency for unit in units}):
        mine = [unit for unit in units if unit.residency == residency]
        mine.sort(key=lambda unit: (unit.expert != residency, unit.expert, unit.part))
        items += _cut(mine, share)
    return sorted(items, key=lambda item: (-_calls(item), item[0].residency))


def _cut(units: Sequence[Unit], share: int) -> Iterable[WorkItem]:
    """Runs of at most `share` calls, or of one unit."""
    run: list[Unit] = []
    for unit in units:
        if run and _calls(run) + unit.calls > share:
            yield tuple(run)
            run = []
        run.append(unit)
    yield tuple(run)


def _calls(units: Iterable[Unit]) -> int:
    return sum(unit.calls for unit in units)
