"""Task families: seeded generators of (prompt, answer), with templates and vocabulary held out by split.

Closed classes (months, weekdays, units, commands, queues, numbers) are shared by all splits; nothing else is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random
from typing import Any, Final, Self

_PERIOD: Final = 5  # of five consecutive items, three are for training, one for validation, one for the test
_MAX_DUPLICATES: Final = 200
_FRESH_MARK: Final = "---"  # in the text of a pool, items after it belong to the split FRESH


class Split(StrEnum):
    """The templates and words of a row; splits share none.

    FRESH was written after all adapters were trained, and nothing was chosen or changed by the scores on it.
    TEST was inspected while the generators were written.
    """

    TRAIN = "train"
    VALID = "valid"
    TEST = "test"
    FRESH = "fresh"


class Pool(tuple[str, ...]):
    """Templates or words of one role, dealt to the splits 3 : 1 : 1 by position, so that no item is in two of them.

    Attributes:
        fresh: the items of the split FRESH, which are separate and do not affect the other splits.
    """

    fresh: tuple[str, ...]

    def __new__(cls, items: Iterable[str], fresh: Iterable[str] = ()) -> Self:
        """A pool of `items` for the first three splits and of `fresh` ones for the last."""
        pool = super().__new__(cls, items)
        pool.fresh = tuple(fresh)
        return pool

    def of(self, split: Split) -> tuple[str, ...]:
        """The items of a split."""
        if split is Split.FRESH:
            return self.fresh
        if split is Split.TRAIN:
            return tuple(item for i, item in enumerate(self) if i % _PERIOD < 3)
        return tuple(self[3 if split is Split.VALID else 4 :: _PERIOD])


def words(text: str) -> Pool:
    """A pool of the whitespace-separated words of `text`; those after `---` are fresh."""
    return _pool(text, str.split)


def phrases(text: str) -> Pool:
    """A pool of the phrases of `text`, which semicolons separate; those after `---` are fresh."""
    return _pool(text, lambda part: [" ".join(phrase.split()) for phrase in part.split(";") if phrase.strip()])


def lines(text: str) -> Pool:
    """A pool of the non-empty lines of `text`; those after `---` are fresh."""
    return _pool(text, lambda part: [line.strip() for line in part.splitlines() if line.strip()])


def _pool(text: str, items: Callable[[str], list[str]]) -> Pool:
    dealt, _, fresh = text.partition(_FRESH_MARK)
    return Pool(items(dealt), items(fresh))


@dataclass(frozen=True, slots=True)
class Draw:
    """Random draws within one split."""

    rng: Random
    split: Split

    def pick(self, pool: Pool) -> str:
        """One item of the pool that belongs to this split."""
        return self.rng.choice(pool.of(self.split))

    def picks(self, pool: Pool, k: int) -> list[str]:
        """`k` different items of the pool that belong to this split."""
        return self.rng.sample(pool.of(self.split), k)


@dataclass(frozen=True, slots=True)
class Row:
    """One query with its right answer.

    Attributes:
        extras: what the grader needs in addition to the answer.
        completion: the text an adapter is trained to generate, if longer than the answer (a sum with its result).
    """

    prompt: str
    answer: str
    extras: Mapping[str, Any] = field(default_factory=dict)
    completion: str | None = None

    @property
    def target(self) -> str:
        """The text to train on."""
        return self.answer if self.completion is None else self.completion


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of task that one small adapter can learn.

    Attributes:
        name: also the name of its adapter and of its task; it never occurs in a prompt.
        about: one line for cards and tables.
        grader: how an answer is judged: exact, number, choice, json or sql.
        max_tokens: limit for an answer; correct answers take fewer.
        make: makes one random row.
        pools: every pool of templates and open-class words that `make` draws from, for the tests of disjointness.
        grader_options: passed to the grader.
    """

    name: str
    about: str
    grader: str
    max_tokens: int
    make: Callable[[Draw], Row]
    pools: Mapping[str, Pool]
    grader_options: Mapping[str, Any] = field(default_factory=dict)

    def rows(self, split: Split, n: int, *, seed: int) -> list[Row]:
        """`n` rows with different prompts; the same arguments always give the same rows.

        Raises:
            ValueError: the split has fewer than `n` different prompts.
        """
        draw = Draw(Random(f"{self.name}/{split}/{seed}"), split)
        found: dict[str, Row] = {}
        duplicates = 0
        while len(found) < n:
            row = self.make(draw)
            duplicates = duplicates + 1 if row.prompt in found else 0
            if duplicates > _MAX_DUPLICATES:
                raise ValueError(f"family {self.name!r} has too few different {split} prompts for {n} rows")
            found.setdefault(row.prompt, row)
        return list(found.values())
