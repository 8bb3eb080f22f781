"""The vocabulary of skills: their names, their synonyms, and the skill of a word."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from routers.encoders.embed import embed
from routers.errors import InvalidOutcomes
from routers.kinds.skill.recruiting import Floats, Found

if TYPE_CHECKING:
    from routers.encoders.build import Encoder
    from routers.numeric.neighbours import Vectors
    from routers.outcomes.table import OutcomeTable

PREFIX = "skills."
"""Prefix of the array names in a saved state."""
NONE = -1
"""Padding of the rows of an array of skills."""

_AROUND = " \t\"'`´“”„‘’‚«»‹›*•·,;:!?-–—_"
_JOINTS = str.maketrans(dict.fromkeys("-‐‑–—_/", " "))
_BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}

Indices = NDArray[np.int32]


def normalised(word: str) -> str:
    """A name in the form of the vocabulary; empty where nothing is left.

    Unicode is normalised to NFKC and case is folded; hyphens, underscores and slashes become single spaces; surrounding
    quotes, bullets, punctuation and brackets, and a final full stop, are removed. `C++`, `.NET` and `newton's laws`
    keep their signs.
    """
    text = unicodedata.normalize("NFKC", word).casefold()
    while True:
        before = text
        text = text.strip(_AROUND).rstrip(".").strip()
        if text and _BRACKETS.get(text[0]) == text[-1]:
            text = text[1:-1]
        if text == before:
            return " ".join(text.translate(_JOINTS).split())


@dataclass(frozen=True, slots=True)
class Match:
    """A word and its skill in the vocabulary, or `NONE` where it is far from all of them."""

    word: str
    skill: int
    found: Found
    cosine: float


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """W words that name K skills.

    Attributes:
        words: normalised; the name of a skill comes before its synonyms.
        skill_of: (W,) the skill of each word.
        vectors: (W, dim) of length 1, the words' embeddings.
    """

    words: tuple[str, ...]
    skill_of: Indices
    vectors: Vectors

    @classmethod
    def learned(cls, named: Iterable[Iterable[str]], encoder: Encoder, merge: float | None) -> Self:
        """The skills that queries are labelled with.

        From the most frequent name to the rarest (ties in alphabetical order), each name joins the skill whose name is
        nearest to it where their cosine is at least `merge`, or becomes a skill. The result does not depend on the
        order of the queries.

        Args:
            named: the words of each query; a word counts once per query. merge: `None` merges nothing.

        Raises:
            InvalidOutcomes: no query has a word.
        """
        counts = Counter(word for words in named for word in {normalised(word) for word in words} if word)
        if not counts:
            raise InvalidOutcomes("no row names a skill, so there is nothing to recruit by")
        words = sorted(counts, key=lambda word: (-counts[word], word))
        vectors = embed(encoder, words)
        return cls(tuple(words), _grouped(vectors, merge), vectors)

    def __len__(self) -> int:
        """K."""
        return int(self.skill_of.max()) + 1

    @cached_property
    def names(self) -> tuple[str, ...]:
        """K names, one a skill."""
        _, first = np.unique(self.skill_of, return_index=True)
        return tuple(self.words[i] for i in first)

    def skills_of(self, words: Iterable[str]) -> tuple[int, ...]:
        """The distinct skills of known words, in order; other words are ignored."""
        found = (self._matches.get(normalised(word)) for word in words)
        return tuple(dict.fromkeys(match.skill for match in found if match is not None))

    def look_up(self, words: Sequence[Sequence[str]], encoder: Encoder, floor: float) -> list[list[Match]]:
        """The skills of the words of each of n queries; empty words are ignored.

        A word outside the vocabulary has the skill of the word nearest to it by the cosine of their embeddings, as in
        Symbolic-MoE; ours: where that is below `floor`, the word is unknown.
        """
        texts = [[text for text in map(normalised, of_query) if text] for of_query in words]
        new = sorted({text for of_query in texts for text in of_query} - self._matches.keys())
        found = dict(zip(new, self._nearest(new, encoder, floor), strict=True))
        return [[self._matches.get(text) or found[text] for text in of_query] for of_query in texts]

    @cached_property
    def _matches(self) -> dict[str, Match]:
        """The match of each word of the vocabulary."""
        named = set(self.names)
        return {
            word: Match(word, int(skill), "exact" if word in named else "alias", 1.0)
            for word, skill in zip(self.words, self.skill_of, strict=True)
        }

    def _nearest(self, texts: Sequence[str], encoder: Encoder, floor: float) -> list[Match]:
        if not texts:
            return []
        cosines = embed(encoder, texts) @ self.vectors.T
        rows = cosines.argmax(axis=1)
        best = cosines[np.arange(len(texts)), rows]
        return [
            Match(text, int(self.skill_of[row]) if cosine >= floor else NONE, "nearest", float(cosine))
            for text, row, cosine in zip(texts, rows, best, strict=True)
        ]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything that is an array."""
        return {PREFIX + "skill_of": self.skill_of, PREFIX + "vectors": self.vectors}

    def settings(self) -> dict[str, Any]:
        """Everything else, as JSON values."""
        return {"words": list(self.words)}

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]], settings: Mapping[str, Any]) -> Self:
        """What `arrays()` and `settings()` were taken from.

        Raises:
            KeyError: something is missing.
        """
        return cls(tuple(settings["words"]), arrays[PREFIX + "skill_of"], arrays[PREFIX + "vectors"])


def _grouped(vectors: Vectors, merge: float | None) -> Indices:
    """(W,) the group of each word; further words are compared with the first of a group."""
    if merge is None:
        return np.arange(len(vectors), dtype=np.int32)
    leaders, group_of = np.empty_like(vectors), np.empty(len(vectors), dtype=np.int32)
    n = 0
    for row, vector in enumerate(vectors):
        cosines = leaders[:n] @ vector
        nearest = int(cosines.argmax()) if n else 0
        if n and cosines[nearest] >= merge:
            group_of[row] = nearest
        else:
            leaders[n], group_of[row] = vector, n
            n += 1
    return group_of


def labelled(table: OutcomeTable, column: str | None) -> list[tuple[str, ...]]:
    """The skills of each of n rows, from a column of the table.

    Args:
        column: of lists, or of texts with commas between skills; an empty cell has none. `None` takes the domains, each
            of which is one skill.

    Raises:
        InvalidOutcomes: there is no such column, or `None` is given and there are no domains.
    """
    if column is None:
        if table.domains is None:
            raise InvalidOutcomes(
                "the table has no labels for which skills it needs: name their column (`skill_column`) or the feature "
                "with the words of a keyword expert (`skills`), add a column 'domain', or use kind 'cluster' or 'knn'"
            )
        return [(domain,) for domain in table.domains]
    if table.frame is not None and column in table.frame:
        return [_cell(value) for value in table.frame[column]]
    return [_cell(value) for value in table.labels(column)]


def _cell(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(value.split(","))
    if isinstance(value, list | tuple | np.ndarray):
        return tuple(map(str, value))
    return () if value is None or value != value else (str(value),)  # NaN differs from itself


def padded(rows: Sequence[Sequence[int]]) -> Indices:
    """(N, L) the skills of each row, padded with `NONE`; L is the largest number in a row, at least 1."""
    filled = np.full((len(rows), max([1, *map(len, rows)])), NONE, dtype=np.int32)
    for row, skills in enumerate(rows):
        filled[row, : len(skills)] = skills
    return filled


def counted(skills: Indices, n_skills: int) -> Floats:
    """(N, K) counts of K skills in each of N rows."""
    counts = np.zeros((len(skills), n_skills))
    rows, columns = np.nonzero(skills != NONE)
    np.add.at(counts, (rows, skills[rows, columns]), 1.0)
    return counts
