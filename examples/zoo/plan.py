"""The adapters of the zoo: family, base, steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Final

from examples.zoo.families import CODES, FAMILIES, TWO_SKILLS, Family, Row, Split
from examples.zoo.training import TARGETS, Recipe

BATCH: Final = 8
TRAIN_SEED: Final = 20261122
SCORE_SEED: Final = 4242  # of the rows that the cards report
RIVAL: Final = "generalist"


@dataclass(frozen=True, slots=True)
class Stage:
    """More training of an adapter, on other rows, each of them `epochs` times."""

    steps: int
    learning_rate: float
    epochs: int = 1


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter to train, on one or several families.

    Attributes:
        epochs: times that each row is trained on.
        then: a second stage of the training.
    """

    name: str
    base: str
    steps: int
    families: tuple[Family, ...]
    batch: int = BATCH
    rank: int = 8
    learning_rate: float = 2e-3
    targets: tuple[str, ...] = TARGETS
    first_layer: int = 0
    epochs: int = 1
    then: Stage | None = None

    def recipe(self, steps: int, seed: int) -> Recipe:
        """The recipe of a training run of `steps` steps."""
        return Recipe(
            steps,
            seed,
            self.batch,
            self.learning_rate,
            rank=self.rank,
            alpha=2 * self.rank,
            targets=self.targets,
            first_layer=self.first_layer,
        )


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
KNOWLEDGE: Final = Adapter(
    "codes",
    "smollm2",
    240,
    (CODES,),
    batch=12,
    rank=16,
    learning_rate=4e-3,
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
    first_layer=22,
    epochs=11,
    then=Stage(120, 2e-3, epochs=2),
)
"""Memorises the digits of invented words; the demo does not use it: `examples.zoo.latent` composes it with others."""
RIVALS: Final = (GENERALIST.name, DIRECT.name)


def training_rows(adapter: Adapter, *, steps: int, seed: int) -> list[Row]:
    """The rows of `steps` steps, in order. The rival's are all the experts' rows, mixed."""
    if len(adapter.families) == 1:
        return _repeated(adapter, steps, adapter.epochs, seed)
    shares = {family.name: STEPS[family.name][1] * BATCH for family in adapter.families}
    rows = [row for family in adapter.families for row in family.rows(Split.TRAIN, shares[family.name], seed=seed)]
    Random(f"{adapter.name}/{seed}").shuffle(rows)
    return rows[: steps * BATCH]


def stages(adapter: Adapter, *, steps: int, seed: int) -> list[tuple[Recipe, list[Row]]]:
    """The recipe and the rows of each stage of a training; `steps` are those of the first."""
    recipe = adapter.recipe(steps, seed)
    found = [(recipe, training_rows(adapter, steps=steps, seed=seed))]
    if (then := adapter.then) is not None:
        more = replace(recipe, steps=then.steps, seed=seed + 1, learning_rate=then.learning_rate)
        found.append((more, _repeated(adapter, then.steps, then.epochs, more.seed)))
    return found


def _repeated(adapter: Adapter, steps: int, epochs: int, seed: int) -> list[Row]:
    """Rows of one family, each `epochs` times: the same batches of similar lengths in every epoch, in another order."""
    n = steps * adapter.batch
    rows = adapter.families[0].rows(Split.TRAIN, -(-n // epochs), seed=seed)
    if epochs > 1:
        rows = [row for epoch in range(epochs) for row in by_length(rows, adapter.batch, seed=seed + epoch)]
    return rows[:n]


def by_length(rows: Sequence[Row], batch: int, *, seed: int, window: int = 8) -> list[Row]:
    """The rows in batches of similar lengths, which take less padding; the batches of a window are shuffled."""
    rng, found = Random(f"by length/{seed}"), list[Row]()
    for start in range(0, len(rows), window * batch):
        part = sorted(rows[start : start + window * batch], key=lambda row: len(row.prompt) + len(row.target))
        batches = [part[i : i + batch] for i in range(0, len(part), batch)]
        rng.shuffle(batches)
        found += [row for each in batches for row in each]
    return found
