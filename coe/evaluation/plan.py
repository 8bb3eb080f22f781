"""The plan of an evaluation: experts x tasks x settings, in an order that loads each base once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from coe.errors import InvalidRequest
from coe.evaluation.digest import json_digest
from coe.evaluation.tasks import Task, TaskRow
from coe.types import GenerateRequest
from registry.digest import identity
from registry.errors import UnknownExpert
from registry.spec import ExpertSpec, Kind

ANSWERING_KINDS = frozenset(Kind) - {Kind.EMBEDDING}


@dataclass(frozen=True, slots=True)
class Settings:
    """How every question is asked. At temperature 0 the seed has no effect; `limit` takes the first rows of a task."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InvalidRequest(f"limit must be at least 1, got {self.limit}")
        GenerateRequest(prompt="", temperature=self.temperature, top_p=self.top_p)  # validates both


@dataclass(frozen=True, slots=True)
class PolicyColumn:
    """A policy, measured like an expert; see `coe.evaluation.policies`.

    name: `coe/<policy>`. digest: of everything that its answers depend on. It has no weights and no price: its cost is
    the sum of its expert calls.
    """

    name: str
    digest: str
    base: None = None
    price: None = None

    @property
    def ref(self) -> str:
        """As `ExpertSpec.ref`."""
        return self.name

    def residency(self, experts: Mapping[str, ExpertSpec]) -> str:
        """Its own name: which experts it calls is not known in advance."""
        return self.name


Column = ExpertSpec | PolicyColumn


@dataclass(frozen=True, slots=True)
class Question:
    """One question to one expert, or to a policy."""

    expert: Column
    task: Task
    row: TaskRow

    @property
    def key(self) -> tuple[str, str, str]:
        """`(expert, task, row id)`, unique in a run."""
        return self.expert.name, self.task.name, self.row.id

    def request(self, settings: Settings) -> GenerateRequest:
        """The request. Sampled answers depend on the run's seed and the row, not on the order of requests."""
        text = f"{settings.seed}/{self.task.name}/{self.row.id}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
        return GenerateRequest(
            messages=self.row.messages,
            max_tokens=self.task.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            stop=self.task.stop,
            seed=seed if settings.temperature else None,
            id="/".join(self.key),
        )


@dataclass(frozen=True)
class EvaluationPlan:
    """The questions of a run. Runs with equal manifests have the same questions, so their answers are interchangeable.

    Attributes:
        experts: the measured experts and policies, in the order of the outcome table's columns.
        bases: specs by name of what the experts are made of (bases, members), whose digests count for them.
    """

    experts: tuple[Column, ...]
    tasks: tuple[Task, ...]
    settings: Settings = Settings()
    bases: Mapping[str, ExpertSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(task.head(self.settings.limit) for task in self.tasks))

    def residencies(self) -> list[tuple[str, list[Question]]]:
        """`(residency, questions)`: a base with all its adapters is one residency."""
        residencies: dict[str, list[Question]] = {}
        for spec in self.experts:
            residencies.setdefault(spec.residency(self.bases), []).extend(self.questions_to(spec))
        return list(residencies.items())

    def questions_to(self, spec: Column) -> Iterator[Question]:
        """All questions to one expert."""
        return (Question(spec, task, row) for task in self.tasks for row in task.rows)

    @property
    def n_rows(self) -> int:
        """How many questions each expert gets."""
        return sum(len(task.rows) for task in self.tasks)

    def manifest(self) -> dict[str, Any]:
        """Everything that answers and scores depend on, by content."""
        return {
            "experts": {
                spec.name: identity(spec, self.bases) if isinstance(spec, ExpertSpec) else spec.digest
                for spec in self.experts
            },
            "tasks": {task.name: task.digest for task in self.tasks},
            "settings": asdict(self.settings),
        }

    @property
    def fingerprint(self) -> str:
        """Hash of the manifest."""
        return json_digest(self.manifest()).removeprefix("sha256:")[:16]


def plan_run(
    known: Mapping[str, ExpertSpec],
    tasks: Sequence[Task],
    names: Sequence[str] | None = None,
    settings: Settings | None = None,
    policies: Mapping[str, PolicyColumn] = MappingProxyType({}),
) -> EvaluationPlan:
    """A plan for the named experts, or for all that answer questions.

    Args:
        policies: policies that may be named, as `coe/<policy>`.

    Raises:
        UnknownExpert: a name is not known; with close matches.
        InvalidRequest: a named expert does not answer questions, or there is none at all.
    """
    chosen: list[Column]
    if names is None:
        chosen = [spec for spec in known.values() if spec.kind in ANSWERING_KINDS]
    else:
        chosen = [policies[name] if name in policies else _named(name, known) for name in dict.fromkeys(names)]
    if not chosen:
        raise InvalidRequest(
            "no expert to evaluate: list one in the configuration's `experts` files, "
            "or register one (`coe registry apply`)"
        )
    specs = [spec for spec in chosen if isinstance(spec, ExpertSpec)]
    bases = {name: _named(name, known) for spec in specs for name in _parts(spec, known)}
    return EvaluationPlan(tuple(chosen), tuple(tasks), settings or Settings(), bases)


def _parts(spec: ExpertSpec, known: Mapping[str, ExpertSpec]) -> Iterator[str]:
    """The names of the experts that one is made of: a base, or members and their bases."""
    for name in spec.references:
        yield name
        yield from _parts(_named(name, known), known)


def _named(name: str, known: Mapping[str, ExpertSpec]) -> ExpertSpec:
    if name not in known:
        raise UnknownExpert(name, known)
    if known[name].kind not in ANSWERING_KINDS:
        raise InvalidRequest(f"{name!r} is of kind {known[name].kind.value!r}, which is not evaluated on tasks")
    return known[name]
