"""The adapters of the zoo: family, base, steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from examples.zoo.families import FAMILIES, TWO_SKILLS, Family, Row, Split

BATCH: Final = 8
TRAIN_SEED: Final = 20261122
SCORE_SEED: Final = 4242  # of the rows that the cards report
RIVAL: Final = "generalist"


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter to train, on one or several families."""

    name: str
    base: str
    steps: int
    families: tuple[Family, ...]


STEPS: Final = {
    "sql": ("smollm2", 120),
    "shell": ("smollm2", 80),
    "fields": ("smollm2", 60),
    "dates": ("smollm2", 100),
    "units": ("smollm2", 80),
    "math": ("gemma3-270m", 140),
    "sentiment": ("smollm2", 40),
    "intent": ("smollm2", 60),
}
"""family -> (base, steps); the steps come from trial runs on rows that the cards do not report."""

ADAPTERS: Final = {name: Adapter(name, base, steps, (FAMILIES[name],)) for name, (base, steps) in STEPS.items()}

GENERALIST: Final = Adapter(RIVAL, "smollm2", sum(steps for _, steps in STEPS.values()), tuple(FAMILIES.values()))
"""The honest rival: one adapter of the same size, the same rows and as many steps as all the others together."""

_TWO_SKILLS: Final = tuple(pair.family for pair in TWO_SKILLS.values())
AGGREGATOR: Final = Adapter("aggregator", "smollm2", 60, _TWO_SKILLS)
"""Merges the answers of two experts; `examples.zoo.aggregator` trains it and its rival."""
DIRECT: Final = Adapter("direct", "smollm2", 60, _TWO_SKILLS)
"""The rival of the aggregator: the same queries for as many steps, without the experts' answers."""
RIVALS: Final = (GENERALIST.name, DIRECT.name)


def training_rows(adapter: Adapter, *, steps: int, seed: int) -> list[Row]:
    """The rows of `steps` steps, in order. The rival's are all the experts' rows, mixed."""
    from random import Random

    if len(adapter.families) == 1:
        return adapter.families[0].rows(Split.TRAIN, steps * BATCH, seed=seed)
    shares = {family.name: STEPS[family.name][1] * BATCH for family in adapter.families}
    rows = [row for family in adapter.families for row in family.rows(Split.TRAIN, shares[family.name], seed=seed)]
    Random(f"{adapter.name}/{seed}").shuffle(rows)
    return rows[: steps * BATCH]
