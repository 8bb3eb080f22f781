"""The benches: which experts are composed, and the rows that they are trained and tested on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from examples.zoo.families import CODE_SKILLS, FAMILIES, TWO_SKILLS, Family, Row, Split
from examples.zoo.latent.real_sets import REAL_SETS
from examples.zoo.plan import ADAPTERS, BATCH, KNOWLEDGE, SCORE_SEED, TRAIN_SEED, Adapter

_GENERATED: Final = MappingProxyType({Split.VALID: 40, Split.TEST: 60, Split.FRESH: 60})
_REAL: Final = MappingProxyType({Split.VALID: 60, Split.TEST: 200})


@dataclass(frozen=True, slots=True)
class Bench:
    """What a composition is trained and tested on; all methods of a bench get the same rows and steps.

    Attributes:
        families: take turns in the training rows; each is scored by itself.
        members: the primary, then its peers. Every peer is right about a part of the answer.
        rows: split -> rows scored of each family. VALID is for early stopping and for the choice of a single expert.
        right: family -> its peers, where not every peer is right about a part of every family.
    """

    name: str
    families: tuple[Family, ...]
    members: tuple[str, ...]
    steps: int
    batch: int = BATCH
    rows: Mapping[Split, int] = field(default_factory=lambda: _GENERATED)
    right: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def primary(self) -> str:
        """The member that answers."""
        return self.members[0]

    @property
    def peers(self) -> tuple[str, ...]:
        """The other members."""
        return self.members[1:]

    def peers_of(self, family: str) -> tuple[str, ...]:
        """The peers that are right about a part of a family."""
        return self.right.get(family, self.peers)

    def training(self, seed: int) -> list[Row]:
        """The training rows in order, `steps` times `batch`, families in turns."""
        n = self.steps * self.batch
        shares = [
            family.rows(Split.TRAIN, len(range(i, n, len(self.families))), seed=TRAIN_SEED + seed)
            for i, family in enumerate(self.families)
        ]
        return [shares[i % len(shares)][i // len(shares)] for i in range(n)]

    def scored(self, split: Split) -> dict[str, list[Row]]:
        """The rows of a split by family: the same for every method and seed."""
        return {family.name: family.rows(split, self.rows[split], seed=SCORE_SEED) for family in self.families}


def base_of(member: str) -> str:
    """The base model of an expert of the zoo; a base is its own."""
    known: Mapping[str, Adapter] = {**ADAPTERS, KNOWLEDGE.name: KNOWLEDGE}
    return known[member].base if member in known else member


def _two_skills(name: str) -> Bench:
    pair = TWO_SKILLS[name]
    return Bench(name, (pair.family,), ("smollm2", *pair.experts), steps=60)


def _real(name: str) -> Bench:
    return Bench(name, (REAL_SETS[name],), ("smollm2", "gemma3-270m"), steps=35, rows=_REAL)


CODES_BENCH: Final = Bench("codes", tuple(CODE_SKILLS.values()), ("smollm2", KNOWLEDGE.name), steps=120)
BENCHES: Final[Mapping[str, Bench]] = {
    bench.name: bench
    for bench in (
        CODES_BENCH,
        *map(_two_skills, TWO_SKILLS),
        # An expert with a skill of its own is the primary: does it keep it?
        Bench("retention", (TWO_SKILLS["bookings"].family, FAMILIES["fields"]), ("fields", "dates"), steps=60),
        *map(_real, REAL_SETS),
    )
}
"""Knowledge and skill, the two-skill families, an expert that must keep its own skill, and real question sets."""

_PAIRS: Final = {name: pair.experts for name, pair in TWO_SKILLS.items()}
TWO_SKILLS_BENCH: Final = Bench(
    "two-skills",
    tuple(pair.family for pair in TWO_SKILLS.values()),
    ("smollm2", *dict.fromkeys(expert for pair in _PAIRS.values() for expert in pair)),
    steps=60,
    right=_PAIRS,
)
"""All two-skill families at once; a router chooses among their experts when served. Compositions that the zoo ships are
trained on it."""
ALL_BENCHES: Final[Mapping[str, Bench]] = {**BENCHES, TWO_SKILLS_BENCH.name: TWO_SKILLS_BENCH}
"""`BENCHES`, and those that are run only when they are named."""
