"""Declarative files of experts: what a registry should hold, planned, shown, then applied in one transaction.

experts:
  - {name: smol, kind: model, source: home://models/SmolLM2-135M-Instruct}
  - {name: sql, kind: adapter, base: smol, source: adapters/sql}     # relative to this file
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from registry.describe import adapter_facts, describe
from registry.documents import Document, Loc, validate
from registry.errors import InvalidSpec, Problem, RegistryError
from registry.sources import SourceKind, absolute_source, has_files, is_here, resolve, source_kind
from registry.spec import ExpertSpec, Kind
from registry.store import Registry, check_references, check_servable, dependents

Action = Literal["add", "update", "unchanged", "remove"]
_GIVEN_BY_THE_REGISTRY = ("version", "files")


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a plan: what happens to a name, and which fields an update changes."""

    action: Action
    name: str
    spec: ExpertSpec | None = None
    changes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Checked:
    """What a file of experts says, without a registry that holds it.

    Attributes:
        experts: by name; described, or as stated where the files are `absent`.
        problems: by line.
        absent: experts whose files on the hub, or whose base's, are not on this machine yet.
        broken: names in the file that are no experts because of a problem.
    """

    experts: Mapping[str, ExpertSpec]
    problems: tuple[Problem, ...]
    absent: tuple[str, ...] = ()
    broken: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Plan:
    """What applying a file would do, and what deserves a second look."""

    steps: tuple[Step, ...]
    warnings: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether the registry already holds what the file says."""
        return all(step.action == "unchanged" for step in self.steps)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    experts: Annotated[list[Any], Field(min_length=1)]


def plan(
    document: Document,
    registry: Registry,
    *,
    prune: bool = False,
    on_expert: Callable[[str, int], None] | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> Plan:
    """Compare a file with the registry; weights are hashed and headers read, nothing is registered.

    Args:
        document: `{experts: [ExpertSpec fields, ...]}`, bases and adapters in any order.
        registry: what to compare with; bases may be there rather than in the file.
        prune: plan the removal of experts that the file does not name.
        on_expert: told the name that is read next, and how many there are (for a progress bar).
        on_bytes: told, while that one's files are hashed, how many bytes of how many are done.

    Raises:
        InvalidSpec: with every problem of the file, by line.
    """
    current = registry.snapshot().experts
    planner = _Planner(document, {} if prune else current)
    planner.parse()
    planner.describe(on_expert, on_bytes)
    if planner.problems:
        raise InvalidSpec(sorted(planner.problems, key=lambda problem: problem.line))
    steps = [_step(current.get(name), spec) for name, spec in planner.described.items()]
    removed = [Step("remove", name) for name in current if prune and name not in planner.described]
    return Plan((*steps, *removed), tuple(_warnings(planner.described.values())))


def check(
    document: Document,
    registered: Mapping[str, ExpertSpec],
    *,
    on_expert: Callable[[str, int], None] | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> Checked:
    """Check a file like `plan`, but download nothing, and return what is wrong in place of raising it.

    Args:
        document, on_expert, on_bytes: as for `plan`.
        registered: experts that the file may refer to.
    """
    planner = _Planner(document, registered, download=False)
    try:
        planner.parse()
    except InvalidSpec as error:
        return Checked({}, error.problems)
    planner.describe(on_expert, on_bytes)
    problems = sorted(planner.problems, key=lambda problem: problem.line)
    return Checked(planner.described, tuple(problems), tuple(planner.absent), frozenset(planner.broken))


def apply(plan: Plan, registry: Registry) -> list[ExpertSpec]:
    """Carry out a plan, all or nothing; return the experts of the file with their versions.

    Raises:
        RegistryError: meanwhile somebody registered an expert that needs one to be removed.
    """
    specs = [step.spec for step in plan.steps if step.spec is not None]
    return registry.change(specs, [step.name for step in plan.steps if step.action == "remove"])


class _Planner:
    """Collects drafts, then described specs, and every problem on the way."""

    def __init__(self, document: Document, registered: Mapping[str, ExpertSpec], *, download: bool = True) -> None:
        self.document, self.registered, self.download = document, registered, download
        self.absent: list[str] = []
        self.problems: list[Problem] = []
        self.drafts: dict[str, tuple[Loc, ExpertSpec]] = {}
        self.described: dict[str, ExpertSpec] = {}
        self.broken: set[str] = (
            set()
        )  # names in the file that cannot be described: nothing more is said of who needs them

    def parse(self) -> None:
        """Drafts of all entries that are well-formed, with their sources made absolute."""
        entries = validate(self.document, _File).experts
        for index, entry in enumerate(entries):
            loc: Loc = ("experts", index)
            name = entry.get("name") if isinstance(entry, dict) else None
            try:
                draft = validate(self.document, ExpertSpec, loc)
            except InvalidSpec as error:
                self.problems += error.problems
                self.broken.add(str(name))
                continue
            for field in _GIVEN_BY_THE_REGISTRY:
                if field in entry:
                    self._problem((*loc, field), "is given by the registry; leave it out")
            if draft.name in self.drafts:
                first = self.document.line((*self.drafts[draft.name][0], "name"))
                self._problem((*loc, "name"), f"{draft.name!r} is given twice; the first is on line {first}")
                continue
            source = absolute_source(draft.source, self.document.folder)
            self.drafts[draft.name] = (loc, draft.model_copy(update={"source": source}))

    def describe(
        self, on_expert: Callable[[str, int], None] | None, on_bytes: Callable[[int, int], None] | None
    ) -> None:
        """Read the files of every draft, bases before their adapters, then of what is registered on a changed base."""
        order = sorted(self.drafts.values(), key=lambda entry: (entry[1].kind is Kind.ADAPTER, entry[0]))
        for loc, draft in order:
            if on_expert is not None:
                on_expert(draft.name, len(order))
            try:
                if self._has_its_references(loc, draft):
                    self.described[draft.name] = self._describe(draft, on_bytes)
                    continue
                if has_files(draft):
                    resolve(draft)  # at least say whether its files are there
            except RegistryError as error:
                self._problem((*loc, "source"), str(error))
            self.broken.add(draft.name)
        self.described = {name: self.described[name] for name in self.drafts if name in self.described}
        for name in self.drafts:
            self._check_registered_adapters(name)

    def _describe(self, draft: ExpertSpec, on_bytes: Callable[[int, int], None] | None) -> ExpertSpec:
        if not self.download and (draft.base in self.absent or not self._is_here(draft)):
            self.absent.append(draft.name)
            return draft
        return describe(draft, self._find(draft.base), on_bytes=on_bytes)

    @staticmethod
    def _is_here(draft: ExpertSpec) -> bool:
        """Whether the files are on this machine, or are missing where only this machine can have them."""
        return is_here(draft) or source_kind(draft.source) is not SourceKind.HUB

    def _has_its_references(self, loc: Loc, draft: ExpertSpec) -> bool:
        """Whether base and members are sound; of a broken one, its own problem says enough."""
        known = {**self.registered, **{name: spec for name, (_, spec) in self.drafts.items()}}
        try:
            check_references(draft, known, unsound=self.broken, where="this file or the registry")
        except RegistryError as error:
            self._problem((*loc, "base" if draft.base else "members"), str(error))
            return False
        try:
            check_servable(draft)
        except RegistryError as error:
            self._problem((*loc, "kind"), str(error))
            return False
        return self.broken.isdisjoint(draft.references)

    def _check_registered_adapters(self, base: str) -> None:
        """A base that changes must still fit the adapters that the file does not mention."""
        described, registered = self.described.get(base), self.registered.get(base)
        if described is None or registered is None or described.digest == registered.digest:
            return
        for name in set(dependents(self.registered, base)) - self.drafts.keys():
            adapter = self.registered[name]
            try:
                if has_files(adapter):
                    adapter_facts(adapter, resolve(adapter), described)
            except RegistryError as error:
                self._problem((*self.drafts[base][0], "source"), f"the registered {name!r} needs {base!r}: {error}")

    def _find(self, base: str | None) -> ExpertSpec | None:
        return None if base is None else self.described.get(base) or self.registered.get(base)

    def _problem(self, loc: Loc, message: str) -> None:
        self.problems.append(self.document.problem(loc, message))


def _step(current: ExpertSpec | None, spec: ExpertSpec) -> Step:
    if current is None:
        return Step("add", spec.name, spec)
    changes = tuple(
        field
        for field in ExpertSpec.model_fields
        if field != "version" and getattr(current, field) != getattr(spec, field)
    )
    return Step("update" if changes else "unchanged", spec.name, spec, changes)


def _warnings(specs: Iterable[ExpertSpec]) -> Iterator[str]:
    for spec in specs:
        if spec.kind is Kind.REMOTE and spec.price is None:
            yield f"{spec.name}: no price is stated, so routing cannot weigh what it costs; add `price`"
