"""Profiles: measured scores of experts as counts by skill, so that later measurements add up.

    registry.record([ProfileRow("sql", identity(spec, experts), "task/orders", digest, "joins", Measure(41.0, 50))])
    registry.profiles().of("sql")["joins"]          # all sources together, of the current content

A row belongs to the content of an expert (`registry.digest.identity`), not to its name, and to the source that was
read. Reading a source again replaces its rows, so nothing counts twice; another source adds rows. An expert whose
content changes starts without measurements; rows of its earlier content stay readable. Shrinkage is applied when rows
are read (`registry.strengths`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Self

from sqlalchemy import and_, delete, insert, or_, select
from sqlalchemy.engine import Connection

from registry.errors import RegistryError, UnknownExpert
from registry.tables import MAX_TEXT, experts, profiles, state

AGGREGATION: Final = "aggregation/"
"""Prefix of sources that measure experts as aggregators of other experts' answers."""


@dataclass(frozen=True, slots=True)
class Measure:
    """Score of an expert on some questions.

    Attributes:
        score: sum over the questions, each in [0, 1]. n: number of questions.
        completion_tokens, seconds: sums; seconds from request to end, waiting included. `None` if not recorded.
    """

    score: float
    n: int
    completion_tokens: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.n < 1 or not -1e-9 <= self.score <= self.n + 1e-9:
            raise RegistryError(f"a score of {self.score} on {self.n} questions is impossible: each is in [0, 1]")
        for name in ("completion_tokens", "seconds"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise RegistryError(f"{name} must be finite and >= 0, got {value}")

    @property
    def accuracy(self) -> float:
        """Mean score."""
        return self.score / self.n

    def __add__(self, other: Measure) -> Measure:
        return Measure(
            self.score + other.score,
            self.n + other.n,
            _sum(self.completion_tokens, other.completion_tokens),
            _sum(self.seconds, other.seconds),
        )


@dataclass(frozen=True, slots=True)
class ProfileRow:
    """The measurement of one expert in one skill by one source.

    Attributes:
        identity: of the expert when it was measured (`registry.digest.identity`).
        source: the task or table that was read. digest: of its content.
    """

    expert: str
    identity: str
    source: str
    digest: str
    skill: str
    measure: Measure


@dataclass(frozen=True)
class Profiles:
    """(expert, skill) -> measure, for the pairs that were measured."""

    cells: Mapping[tuple[str, str], Measure]

    def __post_init__(self) -> None:
        object.__setattr__(self, "cells", MappingProxyType(dict(self.cells)))

    @classmethod
    def of_rows(cls, rows: Iterable[ProfileRow]) -> Self:
        """The rows of all sources, added up."""
        cells: dict[tuple[str, str], Measure] = {}
        for row in rows:
            key = (row.expert, row.skill)
            cells[key] = cells[key] + row.measure if key in cells else row.measure
        return cls(cells)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts measured in any skill, sorted."""
        return tuple(sorted({expert for expert, _ in self.cells}))

    @property
    def skills(self) -> tuple[str, ...]:
        """Names of the skills in which any expert was measured, sorted."""
        return tuple(sorted({skill for _, skill in self.cells}))

    def of(self, expert: str) -> dict[str, Measure]:
        """skill -> measure of one expert; empty if there are none."""
        return {skill: self.cells[expert, skill] for skill in sorted(s for name, s in self.cells if name == expert)}

    def tokens_per_s(self) -> dict[str, float]:
        """Expert -> tokens generated per second, waiting and prompt included, of the experts with both recorded."""
        totals = ((expert, self.total(expert)) for expert in self.experts)
        return {
            expert: total.completion_tokens / total.seconds
            for expert, total in totals
            if total is not None and total.completion_tokens and total.seconds
        }

    def total(self, expert: str) -> Measure | None:
        """The sum over all skills (a question of two skills counts twice); `None` if there are none."""
        measures = list(self.of(expert).values())
        return None if not measures else sum(measures[1:], start=measures[0])


def record(connection: Connection, rows: Sequence[ProfileRow]) -> None:
    """Store rows, replacing earlier rows of the same sources and experts. See `Registry.record`."""
    connection.execute(select(state.c.version).with_for_update())  # serializes writers
    _check(connection, rows)
    for expert, identity, source, digest in {(row.expert, row.identity, row.source, row.digest) for row in rows}:
        same_source = or_(profiles.c.source == source, profiles.c.digest == digest)
        of_expert = and_(profiles.c.expert == expert, profiles.c.identity == identity)
        connection.execute(delete(profiles).where(of_expert, same_source))
    if rows:
        connection.execute(insert(profiles), [_values(row) for row in rows])


def read(connection: Connection, expert: str | None = None) -> list[ProfileRow]:
    """All stored rows, or those of one expert, in the order of storing."""
    columns = [column for column in profiles.columns if column is not profiles.c.id]
    query = select(*columns).order_by(profiles.c.id)
    found = connection.execute(query if expert is None else query.where(profiles.c.expert == expert)).mappings()
    return [_row(dict(values)) for values in found]


def _check(connection: Connection, rows: Sequence[ProfileRow]) -> None:
    known = set(connection.execute(select(experts.c.name).distinct()).scalars())
    keys = set()
    for row in rows:
        if row.expert not in known:
            raise UnknownExpert(row.expert, known)
        for name in ("identity", "source", "skill"):
            text = getattr(row, name)
            if not text or len(text) > MAX_TEXT:
                raise RegistryError(f"a {name} must have 1 to {MAX_TEXT} characters, got {len(text)}: {text[:60]!r}")
        keys.add((row.expert, row.identity, row.source, row.skill))
    if len(keys) < len(rows):
        raise RegistryError("two rows have the same expert, source and skill: add them up first")


def _values(row: ProfileRow) -> dict[str, Any]:
    measure = {name: getattr(row.measure, name) for name in Measure.__dataclass_fields__}
    return {name: getattr(row, name) for name in ("expert", "identity", "source", "digest", "skill")} | measure


def _row(values: dict[str, Any]) -> ProfileRow:
    measure = Measure(**{name: values.pop(name) for name in Measure.__dataclass_fields__})
    return ProfileRow(**values, measure=measure)


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other
