"""Declarative expert files: compare a file with the registry, show the plan, apply it in one transaction.

experts:
  - {name: smol, kind: model, source: home://models/SmolLM2-135M-Instruct}
  - {name: sql, kind: adapter, base: smol, source: adapters/sql}     # relative to this file
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from registry.commands import ServerCommand
from registry.deltas.manifest import read_delta
from registry.describe import adapter_facts, check_composed, check_delta_base, describe
from registry.documents import Document, Loc, validate
from registry.errors import InvalidSpec, Problem, RegistryError, SourceError
from registry.references import check_references, check_servable, dependents
from registry.sources import SourceKind, absolute_source, has_files, is_here, resolve, source_kind
from registry.spec import ExpertSpec, Kind
from registry.store import Registry

Action = Literal["add", "update", "unchanged", "remove"]
_ASSIGNED_BY_REGISTRY = ("version", "files", "trained_with", "restores")
_DESCRIBED_LATE = {Kind.ADAPTER: 2, Kind.COMPOSED: 3}
"""Kinds that need other experts, in the order in which they are described; models that are deltas come before them."""


@dataclass(frozen=True, slots=True)
class PlannedChange:
    """What happens to one expert; `changes` lists the fields that an update changes."""

    action: Action
    name: str
    spec: ExpertSpec | None = None
    changes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Checked:
    """Result of checking an experts file without applying it.

    Attributes:
        experts: by name; described, or as stated if their files are `absent`.
        problems: by line.
        absent: experts whose files on the hub, or those of their base, are not downloaded yet.
        broken: names in the file that cannot be experts because of a problem.
    """

    experts: Mapping[str, ExpertSpec]
    problems: tuple[Problem, ...]
    absent: tuple[str, ...] = ()
    broken: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class RegistryPlan:
    """The changes that applying a file makes, and warnings about its experts."""

    steps: tuple[PlannedChange, ...]
    warnings: tuple[str, ...] = ()


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
) -> RegistryPlan:
    """Compare a file with the registry. Hashes weights and reads headers, registers nothing.

    Args:
        document: `{experts: [ExpertSpec fields, ...]}`, bases and adapters in any order.
        registry: compared with; bases may be registered instead of listed in the file.
        prune: plan the removal of experts that the file does not name.
        on_expert: called with (name read next, number of experts), for a progress bar.
        on_bytes: called with (bytes hashed, bytes in all) of the files of that expert.

    Raises:
        InvalidSpec: lists all problems of the file, by line.
    """
    current = registry.snapshot().experts
    planner = _Planner(document, {} if prune else current)
    planner.parse()
    planner.describe(on_expert, on_bytes)
    if planner.problems:
        raise InvalidSpec(sorted(planner.problems, key=lambda problem: problem.line))
    steps = [_step(current.get(name), spec) for name, spec in planner.described.items()]
    removed = [PlannedChange("remove", name) for name in current if prune and name not in planner.described]
    return RegistryPlan((*steps, *removed), tuple(_warnings(planner.described.values())))


def check(
    document: Document,
    registered: Mapping[str, ExpertSpec],
    *,
    on_expert: Callable[[str, int], None] | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> Checked:
    """Check a file like `plan`, but download nothing, and return problems instead of raising them.

    Args:
        document, on_expert, on_bytes: as for `plan`.
        registered: name -> expert that the file may refer to.
    """
    planner = _Planner(document, registered, download=False)
    try:
        planner.parse()
    except InvalidSpec as error:
        return Checked({}, error.problems)
    planner.describe(on_expert, on_bytes)
    problems = sorted(planner.problems, key=lambda problem: problem.line)
    return Checked(planner.described, tuple(problems), tuple(planner.absent), frozenset(planner.broken))


def apply(plan: RegistryPlan, registry: Registry) -> list[ExpertSpec]:
    """Apply a plan in one transaction; return the experts of the file with their versions.

    Raises:
        RegistryError: an expert registered since the plan needs one that is to be removed.
    """
    specs = [step.spec for step in plan.steps if step.spec is not None]
    return registry.change(specs, [step.name for step in plan.steps if step.action == "remove"])


class _Planner:
    """Collects drafts, described specs, and all problems."""

    def __init__(self, document: Document, registered: Mapping[str, ExpertSpec], *, download: bool = True) -> None:
        self.document, self.registered, self.download = document, registered, download
        self.absent: list[str] = []
        self.problems: list[Problem] = []
        self.drafts: dict[str, tuple[Loc, ExpertSpec]] = {}
        self.described: dict[str, ExpertSpec] = {}
        # Names that cannot be described; experts that need them get no further problem.
        self.broken: set[str] = set()

    def parse(self) -> None:
        """Parse the well-formed entries into drafts with absolute sources."""
        entries = validate(self.document, _File).experts
        for index, entry in enumerate(entries):
            loc: Loc = ("experts", index)
            name = entry.get("name") if isinstance(entry, dict) else None
            try:
                if isinstance(entry, dict) and isinstance(entry.get("source"), dict):
                    validate(self.document, ServerCommand, (*loc, "source"))  # problems at their own lines
                draft = validate(self.document, ExpertSpec, loc)
            except InvalidSpec as error:
                self.problems += error.problems
                if not isinstance(name, list | dict):
                    self.broken.add(str(name))
                continue
            for field in _ASSIGNED_BY_REGISTRY:
                if field in entry:
                    self._problem((*loc, field), "is assigned by the registry; leave it out")
            if draft.name in self.drafts:
                first = self.document.line((*self.drafts[draft.name][0], "name"))
                self._problem((*loc, "name"), f"{draft.name!r} is given twice; the first is on line {first}")
                continue
            try:
                source = absolute_source(draft.source, self.document.folder)
                server = self._here(draft.server)
            except SourceError as error:
                self._problem((*loc, "source"), str(error))
                self.broken.add(draft.name)
                continue
            self.drafts[draft.name] = (loc, draft.stated().model_copy(update={"source": source, "server": server}))

    def describe(
        self, on_expert: Callable[[str, int], None] | None, on_bytes: Callable[[int, int], None] | None
    ) -> None:
        """Read the files of every draft, what others need first, then those of registered adapters on changed bases."""
        order = sorted(self.drafts.values(), key=lambda entry: (_order(entry[1]), entry[0]))
        for loc, draft in order:
            if on_expert is not None:
                on_expert(draft.name, len(order))
            try:
                if self._has_its_references(loc, draft):
                    self.described[draft.name] = self._describe(draft, on_bytes)
                    continue
                if has_files(draft):
                    resolve(draft)  # still report missing files
            except RegistryError as error:
                self._problem((*loc, "source"), str(error))
            self.broken.add(draft.name)
        self.described = {name: self.described[name] for name in self.drafts if name in self.described}
        for name in self.drafts:
            self._check_registered(name)

    def _here(self, server: ServerCommand | None) -> ServerCommand | None:
        """A command that runs in the folder of this file unless it states another."""
        if server is None:
            return None
        folder = absolute_source(server.folder or ".", self.document.folder)
        return server.model_copy(update={"folder": folder})

    def _describe(self, draft: ExpertSpec, on_bytes: Callable[[int, int], None] | None) -> ExpertSpec:
        if not self.download and (self._lacks_files(draft) or not self._is_here(draft)):
            self.absent.append(draft.name)
            return draft
        experts = {**self.registered, **self.described}
        return describe(draft, self._find(draft.base), experts=experts, on_bytes=on_bytes)

    def _lacks_files(self, draft: ExpertSpec) -> bool:
        return not {*draft.references}.isdisjoint(self.absent)

    @staticmethod
    def _is_here(draft: ExpertSpec) -> bool:
        """Whether the files are on this machine, or could only be on this machine."""
        return is_here(draft) or source_kind(draft.source) is not SourceKind.HUB

    def _has_its_references(self, loc: Loc, draft: ExpertSpec) -> bool:
        """Whether base and members are valid; the problem of a broken one is reported at that one."""
        known = {**self.registered, **{name: spec for name, (_, spec) in self.drafts.items()}}
        try:
            check_references(draft, known, unsound=self.broken, where="this file or the registry")
        except RegistryError as error:
            field = "base" if draft.base else "delta_base" if draft.delta_base else "members"
            self._problem((*loc, field), str(error))
            return False
        try:
            check_servable(draft)
        except RegistryError as error:
            self._problem((*loc, "kind"), str(error))
            return False
        return self.broken.isdisjoint(draft.references)

    def _check_registered(self, changed: str) -> None:
        """Check that a changed expert still fits registered adapters and compositions that the file does not list."""
        described, registered = self.described.get(changed), self.registered.get(changed)
        if described is None or registered is None or described.digest == registered.digest:
            return
        for name in sorted(set(dependents(self.registered, changed)) - self.drafts.keys()):
            dependent = self.registered[name]
            try:
                if dependent.delta_base:
                    check_delta_base(dependent, read_delta(resolve(dependent)), {changed: described})
                elif dependent.kind is Kind.COMPOSED:
                    check_composed(dependent, {**self.registered, **self.described})
                elif has_files(dependent):
                    adapter_facts(dependent, resolve(dependent), described)
            except RegistryError as error:
                at = (*self.drafts[changed][0], "source")
                self._problem(at, f"the registered {name!r} needs {changed!r}: {error}")

    def _find(self, base: str | None) -> ExpertSpec | None:
        return None if base is None else self.described.get(base) or self.registered.get(base)

    def _problem(self, loc: Loc, message: str) -> None:
        self.problems.append(self.document.problem(loc, message))


def _order(draft: ExpertSpec) -> int:
    return _DESCRIBED_LATE.get(draft.kind, 1 if draft.delta_base else 0)


def _step(current: ExpertSpec | None, spec: ExpertSpec) -> PlannedChange:
    if current is None:
        return PlannedChange("add", spec.name, spec)
    changes = tuple(
        field
        for field in ExpertSpec.model_fields
        if field != "version" and getattr(current, field) != getattr(spec, field)
    )
    return PlannedChange("update" if changes else "unchanged", spec.name, spec, changes)


def _warnings(specs: Iterable[ExpertSpec]) -> Iterator[str]:
    for spec in specs:
        if spec.kind is Kind.REMOTE and spec.price is None:
            yield f"{spec.name}: has no price, so routing cannot weigh its cost; add `price`"
